//! Norms and element-wise ops on one row or a range of its columns.

use super::simd::{LANES, ROUND_MAGIC, Simd};

/// `e^x` to about one unit in the last place: `2^n · e^r` with `|r| ≤ ln 2 / 2` and a polynomial of degree
/// six in `r` (the coefficients are those of the Cephes library's single-precision exponential). Arguments
/// are limited to -87..=88, so that no result overflows or is zero.
///
/// # Safety
/// The tier's instructions exist.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic only.
    unsafe {
        let x = S::min(S::max(x, S::splat(-87.0)), S::splat(88.0));
        let shifted = S::fma(x, S::splat(std::f32::consts::LOG2_E), S::splat(ROUND_MAGIC));
        let n = S::sub(shifted, S::splat(ROUND_MAGIC));
        // ln 2 as a sum of two numbers; the first has few bits, so that its product with `n` is exact.
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let e = S::add(S::fma(S::mul(p, r), r, r), S::splat(1.0));
        S::mul(e, S::pow2(shifted))
    }
}

/// `out = silu(gate) * up` for `len` values.
///
/// # Safety
/// The tier's instructions exist and the pointers have `len` values; `out` overlaps neither input.
#[inline(always)]
pub(crate) unsafe fn silu_mul<S: Simd>(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
    let mut at = 0;
    while at < len {
        let lanes = LANES.min(len - at);
        // SAFETY: full vectors lie inside; the rest is computed in arrays of a full vector.
        unsafe {
            if lanes == LANES {
                let value = gated::<S>(S::load(gate.add(at)), S::load(up.add(at)));
                S::store(out.add(at), value);
            } else {
                let (mut g, mut u) = ([0.0; LANES], [0.0; LANES]);
                g[..lanes].copy_from_slice(std::slice::from_raw_parts(gate.add(at), lanes));
                u[..lanes].copy_from_slice(std::slice::from_raw_parts(up.add(at), lanes));
                let value = gated::<S>(S::load(g.as_ptr()), S::load(u.as_ptr()));
                S::store(g.as_mut_ptr(), value);
                std::ptr::copy_nonoverlapping(g.as_ptr(), out.add(at), lanes);
            }
        }
        at += lanes;
    }
}

/// `silu(gate) * up`.
///
/// # Safety
/// The tier's instructions exist.
#[inline(always)]
pub(crate) unsafe fn gated<S: Simd>(gate: S::F, up: S::F) -> S::F {
    // SAFETY: arithmetic only.
    unsafe {
        let e = exp::<S>(S::sub(S::splat(0.0), gate));
        S::mul(S::div(gate, S::add(S::splat(1.0), e)), up)
    }
}

/// `out = input * (1 + tanh(u)) / 2` with `u = sqrt(2/pi) (input + 0.044715 input³)`, which is `input / (1 +
/// exp(-2 u))`, for `len` values.
///
/// # Safety
/// The tier's instructions exist and the pointers have `len` values.
#[inline(always)]
pub(crate) unsafe fn gelu_tanh<S: Simd>(input: *const f32, out: *mut f32, len: usize) {
    let mut at = 0;
    while at < len {
        let lanes = LANES.min(len - at);
        // SAFETY: full vectors lie inside; the rest is computed in an array of a full vector.
        unsafe {
            if lanes == LANES {
                S::store(out.add(at), gelu_tanh_of::<S>(S::load(input.add(at))));
            } else {
                let mut rest = [0.0; LANES];
                std::ptr::copy_nonoverlapping(input.add(at), rest.as_mut_ptr(), lanes);
                S::store(rest.as_mut_ptr(), gelu_tanh_of::<S>(S::load(rest.as_ptr())));
                std::ptr::copy_nonoverlapping(rest.as_ptr(), out.add(at), lanes);
            }
        }
        at += lanes;
    }
}

/// # Safety
/// The tier's instructions exist.
#[inline(always)]
unsafe fn gelu_tanh_of<S: Simd>(x: S::F) -> S::F {
    // -2 sqrt(2/pi)
    const FACTOR: f32 = -1.595_769_2;
    // SAFETY: arithmetic only.
    unsafe {
        let cubic = S::fma(S::mul(x, x), S::splat(0.044_715), S::splat(1.0));
        let e = exp::<S>(S::mul(S::mul(x, S::splat(FACTOR)), cubic));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// `data = cap * tanh(data / cap)` for `len` values, in place; the hyperbolic tangent is exact to some 1e-7.
///
/// # Safety
/// The tier's instructions exist and the pointer has `len` values.
#[inline(always)]
pub(crate) unsafe fn soft_cap<S: Simd>(data: *mut f32, cap: f32, len: usize) {
    let mut at = 0;
    while at < len {
        let lanes = LANES.min(len - at);
        // SAFETY: full vectors lie inside; the rest is computed in an array of a full vector.
        unsafe {
            if lanes == LANES {
                S::store(data.add(at), soft_capped::<S>(S::load(data.add(at)), cap));
            } else {
                let mut rest = [0.0; LANES];
                std::ptr::copy_nonoverlapping(data.add(at), rest.as_mut_ptr(), lanes);
                S::store(rest.as_mut_ptr(), soft_capped::<S>(S::load(rest.as_ptr()), cap));
                std::ptr::copy_nonoverlapping(rest.as_ptr(), data.add(at), lanes);
            }
        }
        at += lanes;
    }
}

/// `cap (1 - 2 / (exp(2 x / cap) + 1))`.
///
/// # Safety
/// The tier's instructions exist.
#[inline(always)]
unsafe fn soft_capped<S: Simd>(x: S::F, cap: f32) -> S::F {
    // SAFETY: arithmetic only.
    unsafe {
        let one = S::splat(1.0);
        let e = exp::<S>(S::mul(x, S::splat(2.0 / cap)));
        S::mul(S::splat(cap), S::sub(one, S::div(S::splat(2.0), S::add(e, one))))
    }
}

/// `out = input * factor` for `len` values.
///
/// # Safety
/// The pointers have `len` values; `out` does not overlap `input`.
#[inline(always)]
pub(crate) unsafe fn scale(input: *const f32, factor: f32, out: *mut f32, len: usize) {
    // SAFETY: the caller's pointers have these lengths.
    let (input, out) =
        unsafe { (std::slice::from_raw_parts(input, len), std::slice::from_raw_parts_mut(out, len)) };
    for (out, v) in out.iter_mut().zip(input) {
        *out = v * factor;
    }
}

/// `out = a * b` for `len` values.
///
/// # Safety
/// The pointers have `len` values; `out` overlaps neither input.
#[inline(always)]
pub(crate) unsafe fn mul(a: *const f32, b: *const f32, out: *mut f32, len: usize) {
    // SAFETY: the caller's pointers have these lengths.
    let (a, b, out) = unsafe {
        (
            std::slice::from_raw_parts(a, len),
            std::slice::from_raw_parts(b, len),
            std::slice::from_raw_parts_mut(out, len),
        )
    };
    for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = a * b;
    }
}

/// `out = a + b` for `len` values.
///
/// # Safety
/// The pointers have `len` values; `out` overlaps neither input.
#[inline(always)]
pub(crate) unsafe fn add(a: *const f32, b: *const f32, out: *mut f32, len: usize) {
    // SAFETY: the caller's pointers have these lengths.
    let (a, b, out) = unsafe {
        (
            std::slice::from_raw_parts(a, len),
            std::slice::from_raw_parts(b, len),
            std::slice::from_raw_parts_mut(out, len),
        )
    };
    for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = a + b;
    }
}

/// `out = input / sqrt(mean(input²) + eps) * weight`; squares are summed in f64, in eight interleaved sums.
///
/// # Safety
/// `input` and `out` are as long as `weight` and do not overlap.
#[inline(always)]
pub(crate) unsafe fn rms_norm(input: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
    // SAFETY: the caller's pointers have these lengths.
    let (input, out) = unsafe {
        (std::slice::from_raw_parts(input, weight.len()), std::slice::from_raw_parts_mut(out, weight.len()))
    };
    let mut sums = [0.0f64; 8];
    for eight in input.chunks(8) {
        for (sum, v) in sums.iter_mut().zip(eight) {
            *sum += f64::from(*v) * f64::from(*v);
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    let mean = (((a + b) + (c + d)) + ((e + f) + (g + h))) / weight.len() as f64;
    let factor = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for (out, (v, w)) in out.iter_mut().zip(input.iter().zip(weight)) {
        *out = v * factor * w;
    }
}
