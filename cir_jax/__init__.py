"""Code-integrated reasoning with reinforcement learning, in JAX."""
