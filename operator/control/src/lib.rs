//! Pure part of the control plane: validation, desired objects, routes; no I/O, no clock.
