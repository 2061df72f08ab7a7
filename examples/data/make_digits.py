"""Write digits.npz, the 1,797 handwritten digits that scikit-learn ships, 8 x 8 pixels of 0 to 16, with their labels.

python -m pip install scikit-learn
python examples/data/make_digits.py
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

found = load_digits()
np.savez_compressed(
    Path(__file__).with_name("digits.npz"),
    images=found.images.astype(np.uint8),
    labels=found.target.astype(np.uint8),
)
