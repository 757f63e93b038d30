//! The kernels, and the table that holds one tier's.
//!
//! Each kernel is generic over its lanes and inlined into one entry point per tier, which enables the tier's
//! instructions. A model holds a [`Kernels`], selected once at load.

pub(crate) mod attention;
pub(crate) mod choice;
pub(crate) mod encoder;
pub(crate) mod kv;
pub(crate) mod low_rank;
pub(crate) mod matmul;
pub(crate) mod quantise;
pub(crate) mod rows;
pub(crate) mod simd;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use attention::Attend;
use choice::{PromptProducts, TileChoice, TileRule};
use encoder::{EncoderAttend, LayerNorm};
use low_rank::UpColumns;
use matmul::MatMul;
use quantise::{Bf16Rows, BlockScaledRows, Int8Rows, Layout};

use trustformers_plan::{KvType, Numerics, SampleResult, SampleScratch, SampleSpec, sample};

use crate::{Tier, pack::Form};

/// One tier's kernels; their contracts are those of the generic functions they instantiate.
#[derive(Clone, Copy)]
pub(crate) struct Kernels {
    /// A projection by the kernel in [`matmul`] for the matrix's form and the input.
    pub(crate) matmul: unsafe fn(&MatMul<'_>),
    /// Whether it loads stacked rows into tile registers.
    has_tiles: bool,
    /// Whether it is used for [`matmul::Input::Panels`].
    has_panels: bool,
    /// When it does.
    pub(crate) tiles: TileChoice,
    /// [`BlockScaledRows::fill`]
    pub(crate) quantise: unsafe fn(&BlockScaledRows, usize, *const f32),
    /// [`Int8Rows::fill`]
    pub(crate) quantise_int8: unsafe fn(&Int8Rows, usize, *const f32),
    /// [`Bf16Rows::fill`], on tiers that multiply bf16.
    pub(crate) quantise_bf16: Option<unsafe fn(&Bf16Rows, usize, *const f32)>,
    /// [`rows::rms_norm`]
    pub(crate) rms_norm: unsafe fn(*const f32, &[f32], f32, *mut f32),
    /// [`rows::silu_mul`]
    pub(crate) silu_mul: unsafe fn(*const f32, *const f32, *mut f32, usize),
    /// [`rows::add`]
    pub(crate) add: unsafe fn(*const f32, *const f32, *mut f32, usize),
    /// [`rows::mul`]
    pub(crate) mul: unsafe fn(*const f32, *const f32, *mut f32, usize),
    /// [`rows::scale`]
    pub(crate) scale: unsafe fn(*const f32, f32, *mut f32, usize),
    /// [`rows::gelu_tanh`]
    pub(crate) gelu_tanh: unsafe fn(*const f32, *mut f32, usize),
    /// [`rows::soft_cap`]
    pub(crate) soft_cap: unsafe fn(*mut f32, f32, usize),
    /// [`attention::tile`]
    pub(crate) attend: unsafe fn(&Attend<'_>, std::ops::Range<usize>, *mut f32),
    /// [`attention::merge`]
    pub(crate) merge: unsafe fn(*const f32, usize, usize, *mut f32, usize),
    /// [`encoder::layer_norm`]
    pub(crate) layer_norm: unsafe fn(*const f32, &LayerNorm<'_>, *mut f32),
    /// [`encoder::gelu`]
    pub(crate) gelu: unsafe fn(*const f32, *mut f32, usize),
    /// [`encoder::attend`]
    pub(crate) encoder_attend: unsafe fn(&EncoderAttend<'_>),
    /// [`low_rank::dot`]
    pub(crate) low_rank_dot: unsafe fn(&[f32], &[f32]) -> f32,
    /// [`low_rank::add_up`]
    pub(crate) low_rank_add: unsafe fn(&UpColumns<'_>),
    /// [`trustformers_plan::sample::choose`]
    pub(crate) choose: unsafe fn(&[f32], &SampleSpec<'_>, &mut SampleScratch) -> SampleResult,
}

/// One projection kernel under a tier's instructions.
macro_rules! projection {
    ($name:ident, $rows:ty, $kernel:path $(, $features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        pub(super) unsafe fn $name(job: &MatMul<'_>, x: $rows) {
            // SAFETY: the caller's contract is the same.
            unsafe { $kernel(job, x) }
        }
    };
}

/// Every projection kernel under a tier's instructions.
macro_rules! projections {
    ($lanes:ty, $($features:literal)?) => {
        mod fast {
            use super::{BlockScaledRows, MatMul, matmul};
            projection!(q8, &BlockScaledRows, matmul::block_scaled::run::<$lanes, matmul::Q8> $(, $features)?);
            projection!(q4, &BlockScaledRows, matmul::block_scaled::run::<$lanes, matmul::Q4> $(, $features)?);
            projection!(q5, &BlockScaledRows, matmul::block_scaled::run::<$lanes, matmul::Q5> $(, $features)?);
            projection!(q4_min, &BlockScaledRows, matmul::block_scaled::run::<$lanes, matmul::Q4Min> $(, $features)?);
            projection!(q4_k, &BlockScaledRows, matmul::block_scaled::run::<$lanes, matmul::Q4K> $(, $features)?);
            projection!(q5_k, &BlockScaledRows, matmul::block_scaled::run::<$lanes, matmul::Q5K> $(, $features)?);
            projection!(q6_k, &BlockScaledRows, matmul::block_scaled::run::<$lanes, matmul::Q6K> $(, $features)?);
        }
        mod exact {
            use super::{MatMul, Rows, matmul};
            use crate::kernels::matmul::Quants;
            projection!(floats, Rows, matmul::exact::run::<$lanes, matmul::Floats> $(, $features)?);
            projection!(half_floats, Rows, matmul::exact::run::<$lanes, matmul::HalfFloats> $(, $features)?);
            projection!(upper_halves, Rows, matmul::exact::run::<$lanes, matmul::UpperHalves> $(, $features)?);
            projection!(q8, Rows, matmul::exact::run::<$lanes, Quants<matmul::Q8>> $(, $features)?);
            projection!(q4, Rows, matmul::exact::run::<$lanes, Quants<matmul::Q4>> $(, $features)?);
            projection!(q5, Rows, matmul::exact::run::<$lanes, Quants<matmul::Q5>> $(, $features)?);
            projection!(q4_min, Rows, matmul::exact::run::<$lanes, Quants<matmul::Q4Min>> $(, $features)?);
            projection!(q4_k, Rows, matmul::exact::run::<$lanes, Quants<matmul::Q4K>> $(, $features)?);
            projection!(q5_k, Rows, matmul::exact::run::<$lanes, Quants<matmul::Q5K>> $(, $features)?);
            projection!(q6_k, Rows, matmul::exact::run::<$lanes, Quants<matmul::Q6K>> $(, $features)?);
        }
        projection!(int8, &Int8Rows, matmul::int8::run::<$lanes> $(, $features)?);
    };
}

/// Attention over a cache of one type under a tier's instructions.
macro_rules! attention {
    ($name:ident, $lanes:ty, $element:ty $(, $features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        unsafe fn $name(a: &Attend<'_>, chunks: std::ops::Range<usize>, out: *mut f32) {
            // SAFETY: the caller's contract is the same.
            unsafe { attention::tile::<$lanes, $element>(a, chunks, out) }
        }
    };
}

/// Entry points of one tier: every kernel with the tier's lanes, under the tier's instructions.
macro_rules! tier {
    ($table:ident, $lanes:ty $(, $features:literal)?) => {
        mod $table {
            use super::{
                Attend, BlockScaledRows, EncoderAttend, Int8Rows, Kernels, KvType, LayerNorm, MatMul, SampleResult,
                SampleScratch, SampleSpec, TileChoice, UpColumns, attention, encoder, kv, low_rank, matmul, rows,
                sample,
            };
            use crate::{kernels::matmul::{Input, Rows}, pack::Form};

            // One function per form and numerics, because one function of all would take the compiler too
            // long.
            projections!($lanes, $($features)?);

            unsafe fn matmul(job: &MatMul<'_>) {
                // SAFETY: the caller's contract is the same.
                unsafe {
                    match (job.matrix.form, job.input) {
                        (Form::Q8, Input::BlockScaled(x)) => fast::q8(job, x),
                        (Form::Q4, Input::BlockScaled(x)) => fast::q4(job, x),
                        (Form::Q5, Input::BlockScaled(x)) => fast::q5(job, x),
                        (Form::Q4Min, Input::BlockScaled(x)) => fast::q4_min(job, x),
                        (Form::Q4K, Input::BlockScaled(x)) => fast::q4_k(job, x),
                        (Form::Q5K, Input::BlockScaled(x)) => fast::q5_k(job, x),
                        (Form::Q6K, Input::BlockScaled(x)) => fast::q6_k(job, x),
                        (Form::Int8, Input::Int8(x)) => int8(job, x),
                        (Form::F32, Input::Floats(x)) => exact::floats(job, x),
                        (Form::F16, Input::Floats(x)) => exact::half_floats(job, x),
                        (Form::Bf16, Input::Floats(x)) => exact::upper_halves(job, x),
                        (Form::Q8, Input::Floats(x)) => exact::q8(job, x),
                        (Form::Q4, Input::Floats(x)) => exact::q4(job, x),
                        (Form::Q5, Input::Floats(x)) => exact::q5(job, x),
                        (Form::Q4Min, Input::Floats(x)) => exact::q4_min(job, x),
                        (Form::Q4K, Input::Floats(x)) => exact::q4_k(job, x),
                        (Form::Q5K, Input::Floats(x)) => exact::q5_k(job, x),
                        (Form::Q6K, Input::Floats(x)) => exact::q6_k(job, x),
                        (form, _) => unreachable!("{form:?} has no kernel for such activations"),
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantise(rows: &BlockScaledRows, row: usize, input: *const f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows.fill::<$lanes>(row, input) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantise_int8(rows: &Int8Rows, row: usize, input: *const f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows.fill::<$lanes>(row, input) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rms_norm(input: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::rms_norm(input, weight, eps, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn silu_mul(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::silu_mul::<$lanes>(gate, up, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add(a: *const f32, b: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::add(a, b, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn mul(a: *const f32, b: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::mul(a, b, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn scale(input: *const f32, factor: f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::scale(input, factor, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gelu_tanh(input: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::gelu_tanh::<$lanes>(input, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn soft_cap(data: *mut f32, cap: f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::soft_cap::<$lanes>(data, cap, len) }
            }
            attention!(attend_f32, $lanes, f32 $(, $features)?);
            attention!(attend_f16, $lanes, kv::HalfElement $(, $features)?);
            attention!(attend_bf16, $lanes, kv::Bf16Element $(, $features)?);
            unsafe fn attend(a: &Attend<'_>, chunks: std::ops::Range<usize>, out: *mut f32) {
                // SAFETY: the caller's contract is the same.
                unsafe {
                    match a.kv_type {
                        KvType::F32 => attend_f32(a, chunks, out),
                        KvType::F16 => attend_f16(a, chunks, out),
                        KvType::Bf16 => attend_bf16(a, chunks, out),
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn merge(partials: *const f32, stride: usize, chunks: usize, out: *mut f32, dim: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { attention::merge(partials, stride, chunks, out, dim) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn layer_norm(input: *const f32, norm: &LayerNorm<'_>, out: *mut f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { encoder::layer_norm(input, norm, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gelu(input: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { encoder::gelu::<$lanes>(input, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn encoder_attend(a: &EncoderAttend<'_>) {
                // SAFETY: the caller's contract is the same.
                unsafe { encoder::attend::<$lanes>(a) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn low_rank_dot(a: &[f32], b: &[f32]) -> f32 {
                low_rank::dot(a, b)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn low_rank_add(job: &UpColumns<'_>) {
                // SAFETY: the caller's contract is the same.
                unsafe { low_rank::add_up(job) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn choose(
                logits: &[f32],
                spec: &SampleSpec<'_>,
                scratch: &mut SampleScratch,
            ) -> SampleResult {
                sample::choose(logits, spec, scratch)
            }

            pub(super) const TABLE: Kernels = Kernels {
                matmul, has_tiles: false, has_panels: false, tiles: TileChoice::NEVER, quantise, quantise_int8, quantise_bf16: None, rms_norm, silu_mul, add, mul,
                scale, gelu_tanh, soft_cap, attend, merge, layer_norm, gelu, encoder_attend, low_rank_dot, low_rank_add, choose,
            };
        }
    };
}

tier!(scalar, crate::kernels::simd::Scalar);
#[cfg(target_arch = "x86_64")]
tier!(avx2, crate::kernels::x86::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
tier!(avx512, crate::kernels::x86::Avx512<false>, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl");
#[cfg(target_arch = "x86_64")]
tier!(
    avx512_vnni,
    crate::kernels::x86::Avx512<true>,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
);

/// The kernels that the BF16 extension of AVX-512 adds to [`avx512_vnni`].
#[cfg(target_arch = "x86_64")]
mod avx512_bf16 {
    use super::{Bf16Rows, Kernels, MatMul, avx512_vnni, matmul, matmul::Input};

    projection!(
        rows,
        &Bf16Rows,
        matmul::bf16::run::<crate::kernels::x86::Avx512<true>>,
        "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
    );

    unsafe fn matmul(job: &MatMul<'_>) {
        // SAFETY: the caller's contract is the same.
        unsafe {
            match job.input {
                Input::Bf16(x) => rows(job, x),
                _ => (avx512_vnni::TABLE.matmul)(job),
            }
        }
    }

    // Rounding needs no BF16 instruction; the AMX tier uses this too.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn quantise(rows: &Bf16Rows, row: usize, input: *const f32) {
        // SAFETY: the caller's contract is the same.
        unsafe { rows.fill(row, input) }
    }

    pub(super) const TABLE: Kernels = Kernels { matmul, quantise_bf16: Some(quantise), ..avx512_vnni::TABLE };
}

/// The kernels that tile registers add to [`avx512_vnni`].
#[cfg(target_arch = "x86_64")]
mod amx {
    use super::{
        Bf16Rows, BlockScaledRows, Int8Rows, Kernels, Layout, MatMul, TileChoice, TileRule, avx512_bf16,
        avx512_vnni, matmul, matmul::Input,
    };
    use crate::pack::Form;

    /// A projection kernel on tile registers; the code around them needs the instructions of
    /// [`avx512_vnni`](super::avx512_vnni).
    macro_rules! on_tiles {
        ($name:ident, $rows:ty, $kernel:path) => {
            projection!($name, $rows, $kernel, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");
        };
    }
    on_tiles!(int8, &Int8Rows, matmul::tiles::int8);
    on_tiles!(bf16, &Bf16Rows, matmul::tiles::bf16);
    on_tiles!(panels_q8, &Bf16Rows, matmul::tiles::panels::<matmul::Q8>);
    on_tiles!(panels_q4, &Bf16Rows, matmul::tiles::panels::<matmul::Q4>);
    on_tiles!(panels_q5, &Bf16Rows, matmul::tiles::panels::<matmul::Q5>);
    on_tiles!(panels_q4_min, &Bf16Rows, matmul::tiles::panels::<matmul::Q4Min>);
    on_tiles!(panels_q4_k, &Bf16Rows, matmul::tiles::panels::<matmul::Q4K>);
    on_tiles!(panels_q5_k, &Bf16Rows, matmul::tiles::panels::<matmul::Q5K>);
    on_tiles!(panels_q6_k, &Bf16Rows, matmul::tiles::panels::<matmul::Q6K>);
    on_tiles!(q8, &BlockScaledRows, matmul::tiles::block_scaled::<matmul::Q8>);
    on_tiles!(q4, &BlockScaledRows, matmul::tiles::block_scaled::<matmul::Q4>);
    on_tiles!(q5, &BlockScaledRows, matmul::tiles::block_scaled::<matmul::Q5>);
    on_tiles!(q4_min, &BlockScaledRows, matmul::tiles::block_scaled::<matmul::Q4Min>);
    on_tiles!(q4_k, &BlockScaledRows, matmul::tiles::block_scaled::<matmul::Q4K>);
    on_tiles!(q5_k, &BlockScaledRows, matmul::tiles::block_scaled::<matmul::Q5K>);
    on_tiles!(q6_k, &BlockScaledRows, matmul::tiles::block_scaled::<matmul::Q6K>);

    unsafe fn matmul(job: &MatMul<'_>) {
        // SAFETY: the caller's contract is the same.
        unsafe {
            match job.input {
                Input::Bf16(x) => bf16(job, x),
                Input::Panels(x) => match job.matrix.form {
                    Form::Q8 => panels_q8(job, x),
                    Form::Q4 => panels_q4(job, x),
                    Form::Q5 => panels_q5(job, x),
                    Form::Q4Min => panels_q4_min(job, x),
                    Form::Q4K => panels_q4_k(job, x),
                    Form::Q5K => panels_q5_k(job, x),
                    Form::Q6K => panels_q6_k(job, x),
                    form => unreachable!("{form:?} has no blocks to become bf16"),
                },
                Input::Int8(x) if x.layout() == Layout::Stacked => int8(job, x),
                Input::BlockScaled(x) if x.layout() == Layout::Stacked => match job.matrix.form {
                    Form::Q8 => q8(job, x),
                    Form::Q4 => q4(job, x),
                    Form::Q5 => q5(job, x),
                    Form::Q4Min => q4_min(job, x),
                    Form::Q4K => q4_k(job, x),
                    Form::Q5K => q5_k(job, x),
                    Form::Q6K => q6_k(job, x),
                    form => unreachable!("{form:?} has no kernel for such activations"),
                },
                _ => (avx512_vnni::TABLE.matmul)(job),
            }
        }
    }

    pub(super) const TABLE: Kernels = Kernels {
        matmul,
        has_tiles: true,
        tiles: TileChoice::by(TileRule::Measured),
        quantise_bf16: avx512_bf16::TABLE.quantise_bf16,
        ..avx512_vnni::TABLE
    };
}

impl Kernels {
    /// The layout of `rows` [`BlockScaledRows`] for weights of a form.
    pub(crate) fn block_scaled_layout(&self, form: Form, rows: usize) -> Layout {
        if self.tiles.uses_tiles(form, rows) { Layout::Stacked } else { Layout::Interleaved }
    }

    /// The layout of `rows` [`Int8Rows`].
    pub(crate) fn int8_layout(&self, rows: usize) -> Layout {
        self.block_scaled_layout(Form::Int8, rows)
    }

    /// Whether products with weights of a form read activations as floats, not quantised.
    pub(crate) fn reads_floats(&self, form: Form, numerics: Numerics) -> bool {
        let is_fast = numerics == Numerics::Fast;
        match form {
            Form::Int8 => false,
            Form::Bf16 => !(is_fast && self.quantise_bf16.is_some()),
            form => !(is_fast && form.has_block_scales()),
        }
    }

    /// The choice in the description of a device: the fewest rows on tile registers, of all forms.
    pub(crate) fn described(&self) -> String {
        match self.tiles.least_rows() {
            Some(rows) => format!(", tiles from {rows} rows"),
            None => String::new(),
        }
    }

    /// The same kernels, chosen by a rule.
    pub(crate) fn chosen_by(self, rule: TileRule) -> Self {
        let tiles = match rule {
            _ if !self.has_tiles => TileChoice::NEVER,
            TileRule::Measured => TileChoice::measured(&self),
            rule => TileChoice::by(rule),
        };
        Self { tiles, ..self }
    }

    /// Whether it multiplies rows of prompts by weights that become bf16 ([`matmul::Input::Panels`]).
    pub(crate) const fn has_panels(&self) -> bool {
        self.has_panels
    }

    /// The same kernels, with these products of prompts.
    pub(crate) fn with_prompts(self, products: PromptProducts) -> Self {
        Self { has_panels: self.has_tiles && products == PromptProducts::Panels, ..self }
    }

    /// Values of scratch memory that projections of at most `cols` columns need.
    pub(crate) fn matmul_scratch_len(&self, cols: usize) -> usize {
        matmul::scratch_len(cols, self.has_tiles)
    }

    /// The kernels of an available tier.
    ///
    /// # Panics
    /// When the processor lacks the tier's instructions, which [`crate::CpuBackend::new`] refuses.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn of(tier: Tier) -> Self {
        assert!(tier.is_available(), "this processor has no {tier}");
        match tier {
            Tier::Scalar => scalar::TABLE,
            Tier::Avx2 => avx2::TABLE,
            Tier::Avx512 => avx512::TABLE,
            Tier::Avx512Vnni => avx512_vnni::TABLE,
            Tier::Avx512Bf16 => avx512_bf16::TABLE,
            Tier::Amx => amx::TABLE,
        }
    }

    /// The kernels of an available tier.
    ///
    /// # Panics
    /// When the processor lacks the tier's instructions, which [`crate::CpuBackend::new`] refuses.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn of(tier: Tier) -> Self {
        assert!(tier.is_available(), "this processor has no {tier}");
        scalar::TABLE
    }
}
