//! CPU backend: run-time dispatch over SIMD tiers.
