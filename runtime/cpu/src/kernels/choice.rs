//! The choice between kernels of equal bits: projections on vectors, or on tile registers.
//!
//! Which of them is faster depends on the processor, the form of the weights and the number of rows: tiles
//! compute sixteen rows at once, however few of them are used. So both are measured once in a process, with
//! a small matrix of each form and some numbers of rows. Answers do not depend on the choice.

use std::{sync::OnceLock, time::Instant};

use trustformers_plan::{DType, Weight};

use super::{
    Kernels,
    matmul::{Activation, Input, MatMul, Target},
    quantise::{BlockScaledRows, Int8Rows, Layout},
};
use crate::{
    memory::{SharedF32, Store},
    pack::{Form, Packed},
};

/// When projections are computed on tile registers, on processors that have them. Both kinds of kernels give
/// the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TileRule {
    /// Where they were faster in a measurement at start, which takes less than 50 ms.
    #[default]
    Measured,
    /// For every number of rows.
    Always,
    /// For none.
    Never,
    /// For this number of rows and more, 1 to 64; for none where it is larger.
    From(usize),
}

/// How the projections of prompts are computed in fast numerics: those of sequences with 64 or more rows in a
/// step, on processors with tile registers. All other rows have the same bits in every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PromptProducts {
    /// Weights of blocks become bf16 once for all rows of a step. It is faster, and the bits of a row depend
    /// on how many rows of its sequence the step has.
    #[default]
    Panels,
    /// Like those of all other rows.
    LikeOthers,
}

/// The forms that have kernels of both kinds, each with a stored type that it is made of.
const FORMS: [(Form, DType); 8] = [
    (Form::Q8, DType::Q8_0),
    (Form::Q4, DType::Q4_0),
    (Form::Q5, DType::Q5_0),
    (Form::Q4Min, DType::Q4_1),
    (Form::Q4K, DType::Q4_K),
    (Form::Q5K, DType::Q5_K),
    (Form::Q6K, DType::Q6_K),
    (Form::Int8, DType::F32),
];

/// Most rows that are chosen for; more rows fill tiles, and are computed on them.
const MOST_ROWS: usize = 64;

/// Numbers of rows that are measured, in rising order. What lies between two of them is like the larger one.
const MEASURED_ROWS: [usize; 14] = [1, 2, 4, 6, 8, 10, 12, 16, 18, 24, 32, 36, 48, MOST_ROWS];

/// For each form, the numbers of rows for which tile registers are used: bit `n - 1` for `n` rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TileChoice([u64; FORMS.len()]);

impl TileChoice {
    /// On processors without tile registers.
    pub(crate) const NEVER: Self = Self([0; FORMS.len()]);

    /// The choice by a rule other than [`TileRule::Measured`], for which it stands where nothing is measured:
    /// by count of instructions (`docs/performance.md`) tiles and vectors take about the same time for eight
    /// rows.
    pub(crate) const fn by(rule: TileRule) -> Self {
        let least_rows = match rule {
            TileRule::Always => 1,
            TileRule::Never => return Self::NEVER,
            TileRule::Measured => 8,
            TileRule::From(rows) => rows,
        };
        Self(
            [if least_rows > MOST_ROWS { 0 } else { u64::MAX << (least_rows.saturating_sub(1)) };
                FORMS.len()],
        )
    }

    /// Whether `rows` rows of a projection with such weights are computed on tile registers.
    pub(crate) fn uses_tiles(&self, form: Form, rows: usize) -> bool {
        if *self == Self::NEVER || rows == 0 {
            return false;
        }
        let index = FORMS.iter().position(|(other, _)| *other == form);
        index.is_some_and(|index| rows > MOST_ROWS || self.0[index] >> (rows - 1) & 1 == 1)
    }

    /// The fewest rows for which some form uses tile registers; `None` where no form does.
    pub(crate) fn least_rows(&self) -> Option<usize> {
        self.0.iter().filter(|bits| **bits != 0).map(|bits| bits.trailing_zeros() as usize + 1).min()
    }

    /// The choice of this processor, measured in the first call.
    pub(crate) fn measured(kernels: &Kernels) -> Self {
        static CHOICE: OnceLock<TileChoice> = OnceLock::new();
        *CHOICE.get_or_init(|| {
            let started = Instant::now();
            let choice =
                Self(FORMS.map(|(form, dtype)| measure(kernels, form, dtype).map_or(0, |t| rows_of(&t))));
            let took_ms = started.elapsed().as_millis();
            tracing::info!(took_ms, %choice, "kernels were chosen by a measurement");
            choice
        })
    }
}

/// The numbers of rows that use tiles, form by form, such as `Q4 16-64`.
impl std::fmt::Display for TileChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (form, _)) in FORMS.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            write!(f, "{separator}{form:?}")?;
            let (mut first, uses) = (1, |rows| self.uses_tiles(*form, rows));
            let mut separator = " ";
            while let Some(start) = (first..=MOST_ROWS).find(|rows| uses(*rows)) {
                let end = (start..=MOST_ROWS).find(|rows| !uses(*rows)).map_or(MOST_ROWS, |rows| rows - 1);
                write!(f, "{separator}{start}-{end}")?;
                (first, separator) = (end + 1, "+");
            }
        }
        Ok(())
    }
}

/// Seconds of both kinds of kernels for one of [`MEASURED_ROWS`].
#[derive(Debug, Clone, Copy)]
struct Timing {
    vectors: f64,
    tiles: f64,
}

/// The bits of a [`TileChoice`].
fn rows_of(timings: &[Timing; MEASURED_ROWS.len()]) -> u64 {
    (1..=MOST_ROWS).fold(0, |bits, rows| {
        let measured = MEASURED_ROWS.iter().position(|measured| *measured >= rows);
        let is_faster = measured.is_some_and(|index| timings[index].tiles < timings[index].vectors);
        bits | u64::from(is_faster) << (rows - 1)
    })
}

/// Features and columns of the measured matrices: their weights stay in the second-level cache, and columns
/// are whole blocks of every type.
const FEATURES: usize = 128;
const COLS: usize = 512;
/// Runs of each kernel, of which the fastest counts.
const RUNS: usize = 4;

/// Times the kernels of one form; `None` where there is no memory for it.
fn measure(kernels: &Kernels, form: Form, dtype: DType) -> Option<[Timing; MEASURED_ROWS.len()]> {
    let bytes = stored(dtype);
    let range = 0..bytes.len();
    let weight = Weight::new("measured", dtype, (FEATURES, COLS), std::sync::Arc::new(bytes), range).ok()?;
    let mut store = Store::new("a measurement", Packed::bytes_of(form, FEATURES, COLS)).ok()?;
    let matrix = Packed::empty(form, &weight, &mut store);
    // SAFETY: no other thread has the matrix.
    unsafe { matrix.fill(0..matrix.groups(), &weight) };
    let bytes = BlockScaledRows::bytes(MOST_ROWS, COLS).max(Int8Rows::bytes(MOST_ROWS, COLS));
    let quantised = SharedF32::new("a measurement", bytes.div_ceil(size_of::<f32>())).ok()?;
    let scratch = SharedF32::new("a measurement", kernels.matmul_scratch_len(COLS)).ok()?;
    let x: Vec<f32> = (0..COLS).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let mut out = vec![0f32; MOST_ROWS * FEATURES];
    let mut seconds = |rows: usize, layout: Layout| {
        // SAFETY: the memory has room for the rows in either layout, the outputs and the scratch memory for
        // the projection; this thread alone has them.
        unsafe {
            let blocks = BlockScaledRows::new(quantised.ptr().cast(), COLS, layout);
            let int8 = Int8Rows::new(quantised.ptr().cast(), COLS, layout);
            for row in 0..rows {
                match form {
                    Form::Int8 => (kernels.quantise_int8)(&int8, row, x.as_ptr()),
                    _ => (kernels.quantise)(&blocks, row, x.as_ptr()),
                }
            }
            if form != Form::Int8 {
                blocks.end(rows);
            }
            let input = if form == Form::Int8 { Input::Int8(&int8) } else { Input::BlockScaled(&blocks) };
            let activation = Activation::None;
            let job = MatMul {
                matrix: &matrix,
                units: 0..MatMul::units_of(&matrix, &activation),
                rows,
                row_map: None,
                input,
                target: Target {
                    ptr: out.as_mut_ptr(),
                    stride: FEATURES,
                    bias: None,
                    activation,
                    residual: None,
                },
                scratch: scratch.ptr(),
            };
            let run = || {
                let started = Instant::now();
                (kernels.matmul)(&job);
                started.elapsed().as_secs_f64()
            };
            (0..RUNS).map(|_| run()).fold(f64::MAX, f64::min)
        }
    };
    Some(MEASURED_ROWS.map(|rows| Timing {
        vectors: seconds(rows, Layout::Interleaved),
        tiles: seconds(rows, Layout::Stacked),
    }))
}

/// A stored matrix with quants of every value and scales of about 0.008: numbers that are subnormal would
/// take longer than those of a model.
fn stored(dtype: DType) -> Vec<u8> {
    let small = [0x10, 0x20];
    let block = |seed: usize| {
        let mut bytes: Vec<u8> = (0..dtype.block_bytes()).map(|i| (((seed + i) * 37) >> 3) as u8).collect();
        match dtype {
            DType::Q4_1 | DType::Q4_K | DType::Q5_K => {
                bytes[..2].copy_from_slice(&small);
                bytes[2..4].copy_from_slice(&small);
            }
            DType::Q6_K => bytes[208..210].copy_from_slice(&small),
            DType::F32 => bytes.copy_from_slice(&((seed % 17) as f32 - 8.0).to_le_bytes()),
            DType::F16 | DType::BF16 | DType::Q8_0 | DType::Q4_0 | DType::Q5_0 => {
                bytes[..2].copy_from_slice(&small);
            }
        }
        bytes
    };
    (0..FEATURES * COLS / dtype.block_len()).flat_map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tier;

    #[test]
    fn rows_between_two_measured_numbers_are_like_the_larger_one() {
        let mut timings = [Timing { vectors: 1.0, tiles: 2.0 }; MEASURED_ROWS.len()];
        // 12 < rows <= 16, and 18 < rows.
        for index in [7, 9, 10, 11, 12, 13] {
            timings[index].tiles = 0.5;
        }
        let choice = TileChoice([rows_of(&timings); FORMS.len()]);
        let uses = |rows| choice.uses_tiles(Form::Q4K, rows);
        let used: Vec<usize> = (0..100).filter(|rows| uses(*rows)).collect();
        assert_eq!(used, (13..17).chain(19..100).collect::<Vec<_>>());
        assert!(choice.to_string().starts_with("Q8 13-16+19-64, Q4 13-16"), "{choice}");
    }

    #[test]
    fn rules_say_for_how_many_rows_tiles_are_used() {
        for (rule, first) in [
            (TileRule::Always, Some(1)),
            (TileRule::Never, None),
            (TileRule::Measured, Some(8)),
            (TileRule::From(20), Some(20)),
        ] {
            let choice = TileChoice::by(rule);
            assert_eq!((0..200).find(|rows| choice.uses_tiles(Form::Int8, *rows)), first, "{rule:?}");
        }
        assert!(!TileChoice::by(TileRule::Always).uses_tiles(Form::F32, 16), "floats have no such kernels");
    }

    #[test]
    fn both_kinds_of_kernels_can_be_measured() {
        // On processors without tile registers only vectors are.
        let kernels = Kernels::of(Tier::best());
        if Tier::best() != Tier::Amx {
            return;
        }
        for (form, dtype) in FORMS {
            let timings = measure(&kernels, form, dtype).unwrap();
            assert!(timings.iter().all(|timing| timing.vectors > 0.0 && timing.tiles > 0.0), "{form:?}");
        }
    }
}
