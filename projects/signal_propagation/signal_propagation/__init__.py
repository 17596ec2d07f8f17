"""How far signal and gradient reach in plain and residual networks, at initialisation and after a short training."""
