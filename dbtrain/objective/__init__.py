"""The factors of the one equation: L = sum_b W_b * mean|f(x_t, t, c)_b - y_b|^2. Pure functions of tensors."""
