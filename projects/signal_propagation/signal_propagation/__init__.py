"""How far signal and gradient reach in plain and residual networks, at initialization and after brief training."""
