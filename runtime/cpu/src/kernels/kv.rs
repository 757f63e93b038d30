//! Elements of the key/value cache: f32, f16 or bf16. Attention loads sixteen of them as f32.

use trustformers_plan::{AttentionShape, KV_BLOCK_TOKENS, KvType};

use super::simd::{LANES, Simd, half_to_f32};

/// A type of the cache's elements.
pub(crate) trait KvElement: Copy {
    /// Sixteen adjacent elements.
    ///
    /// # Safety
    /// The tier's instructions exist, and `p` has sixteen elements.
    unsafe fn load<S: Simd>(p: *const Self) -> S::F;
    /// Its number.
    fn number(self) -> f32;
    /// The nearest element; see [`KvType::rounded`].
    fn nearest(v: f32) -> Self;
}

/// An f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct HalfElement(u16);

/// A bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Bf16Element(u16);

impl KvElement for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    fn number(self) -> f32 {
        self
    }
    #[inline(always)]
    fn nearest(v: f32) -> Self {
        v
    }
}

impl KvElement for HalfElement {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { S::load_half(p.cast()) }
    }
    #[inline(always)]
    fn number(self) -> f32 {
        half_to_f32(self.0)
    }
    #[inline(always)]
    fn nearest(v: f32) -> Self {
        // Exact: the number is an f16.
        Self(half::f16::from_f32_const(KvType::F16.rounded(v)).to_bits())
    }
}

impl KvElement for Bf16Element {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { S::load_upper(p.cast()) }
    }
    #[inline(always)]
    fn number(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn nearest(v: f32) -> Self {
        Self(super::quantise::bf16_bits(v))
    }
}

const _: () = assert!(KV_BLOCK_TOKENS == LANES, "sixteen positions of a KV block are the lanes of a score");

/// First element of a KV block's key/value head in its layer: keys `[element][slot]`, then values
/// `[slot][element]`.
pub(crate) const fn cache_index(shape: &AttentionShape, block: usize, kv_head: usize) -> usize {
    (block * shape.kv_heads + kv_head) * 2 * KV_BLOCK_TOKENS * shape.head_dim
}

/// The place of one position in one key/value head of a layer's cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheSlot {
    /// First byte of the layer's cache.
    pub(crate) cache: *mut u8,
    pub(crate) kv_head: usize,
    /// The KV block and the slot in it.
    pub(crate) block: usize,
    pub(crate) slot: usize,
}

impl CacheSlot {
    /// The key's first element, whose next is [`KV_BLOCK_TOKENS`] later, and the value's, whose elements are
    /// adjacent.
    pub(crate) fn of<K: KvElement>(&self, shape: &AttentionShape) -> (*mut K, *mut K) {
        let head = self.cache.cast::<K>().wrapping_add(cache_index(shape, self.block, self.kv_head));
        let value = shape.head_dim * (KV_BLOCK_TOKENS + self.slot);
        (head.wrapping_add(self.slot), head.wrapping_add(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_the_rounded_numbers() {
        for v in [0.1f32, -3.75, 65_504.0, 7e4, 1e-6, -0.0, f32::INFINITY] {
            assert_eq!(f32::nearest(v).number(), v);
            assert_eq!(HalfElement::nearest(v).number(), KvType::F16.rounded(v), "{v}");
            assert_eq!(Bf16Element::nearest(v).number(), KvType::Bf16.rounded(v), "{v}");
        }
        assert!(HalfElement::nearest(f32::NAN).number().is_nan());
        assert!(Bf16Element::nearest(f32::NAN).number().is_nan());
    }
}
