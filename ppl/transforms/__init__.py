"""From models to models: conditioning, scaling, masking, reparametrisation."""
