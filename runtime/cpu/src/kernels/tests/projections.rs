//! Projections of every form, numerics and epilogue.

use half::bf16;
use proptest::prelude::*;
use trustformers_plan::{DType, Weight};

use super::{Samples, has_amx, tiers};
use crate::{
    Tier,
    kernels::{
        Kernels,
        choice::TileRule,
        matmul::{Activation, Input, MatMul, Rows, Target},
        quantise::{Bf16Rows, BlockScaledRows, Int8Rows},
    },
    memory::{SharedF32, Store},
    pack::{Form, Packed},
};

/// The input form, and so the kernels, of a case.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Exact,
    BlockScaled,
    Int8,
    Bf16,
    /// Blocks of weights that become bf16, on tile registers only.
    Panels,
}

impl Mode {
    fn is_available_on(self, tier: Tier) -> bool {
        match self {
            Self::Exact | Self::BlockScaled | Self::Int8 => true,
            Self::Bf16 => Kernels::of(tier).quantise_bf16.is_some(),
            Self::Panels => tier == Tier::Amx,
        }
    }
}

/// The operations after the sums.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Epilogue {
    Nothing,
    Bias,
    Gelu,
    Gate,
}

const EPILOGUES: [Epilogue; 4] = [Epilogue::Nothing, Epilogue::Bias, Epilogue::Gelu, Epilogue::Gate];

/// One projection, with strides wider than the rows.
#[derive(Clone, Copy)]
struct ProjectionCase<'a> {
    /// The second is gated by the first.
    weights: [&'a Weight; 2],
    /// Of both, filled up to whole groups.
    biases: [&'a [f32]; 2],
    x: &'a [f32],
    rows: usize,
    residual: Option<&'a [f32]>,
    mode: Mode,
    epilogue: Epilogue,
}

impl ProjectionCase<'_> {
    fn cols(&self) -> usize {
        self.weights[0].cols()
    }

    fn features(&self) -> usize {
        self.weights[0].rows()
    }

    fn run(&self, tier: Tier) -> Vec<f32> {
        self.run_with(tier, Kernels::of(tier))
    }

    fn run_with(&self, tier: Tier, kernels: Kernels) -> Vec<f32> {
        let (cols, features) = (self.cols(), self.features());
        let packed = self.weights.map(|weight| {
            let form = if self.mode == Mode::Int8 { Form::Int8 } else { Form::of(weight.dtype()) };
            let mut store = Store::new("test", Packed::bytes_of(form, features, cols)).unwrap();
            let packed = Packed::empty(form, weight, &mut store);
            // SAFETY: no other thread has the matrix.
            unsafe { packed.fill(0..packed.groups(), weight) };
            packed
        });
        let scratch = SharedF32::new("test", kernels.matmul_scratch_len(cols)).unwrap();
        let bytes = BlockScaledRows::bytes(self.rows, cols)
            .max(Int8Rows::bytes(self.rows, cols))
            .max(Bf16Rows::bytes(self.rows, cols));
        let memory = SharedF32::new("test", bytes / 4).unwrap();
        // An earlier op left NaNs.
        // SAFETY: the memory is that large, and no other thread has it.
        unsafe { memory.ptr().cast::<u8>().write_bytes(0xFF, bytes) };
        let activation = match self.epilogue {
            Epilogue::Nothing | Epilogue::Bias => Activation::None,
            Epilogue::Gelu => Activation::Gelu,
            Epilogue::Gate => Activation::Gate(&packed[1], Some(self.biases[1])),
        };
        // A column on either side of the outputs must not change.
        let stride = features + 2;
        let mut out = vec![7.5f32; self.rows * stride];
        // SAFETY: all memory has the sizes that the kernels are given.
        unsafe {
            let layout = kernels.block_scaled_layout(packed[0].form, self.rows);
            let blocks = BlockScaledRows::new(memory.ptr().cast(), cols, layout);
            let int8 = Int8Rows::new(memory.ptr().cast(), cols, kernels.int8_layout(self.rows));
            let halves = Bf16Rows::new(memory.ptr().cast(), cols);
            for r in 0..self.rows {
                let row = self.x[r * cols..].as_ptr();
                match self.mode {
                    Mode::Exact => {}
                    Mode::BlockScaled => (kernels.quantise)(&blocks, r, row),
                    Mode::Int8 => (kernels.quantise_int8)(&int8, r, row),
                    Mode::Bf16 | Mode::Panels => (kernels.quantise_bf16.unwrap())(&halves, r, row),
                }
            }
            if self.mode == Mode::BlockScaled {
                blocks.end(self.rows);
            }
            // In two shares, as by two threads.
            let units = MatMul::units_of(&packed[0], &activation);
            for units in [0..units / 2, units / 2..units] {
                (kernels.matmul)(&MatMul {
                    matrix: &packed[0],
                    units,
                    rows: self.rows,
                    row_map: None,
                    input: match self.mode {
                        Mode::Exact => Input::Floats(Rows { ptr: self.x.as_ptr(), stride: cols }),
                        Mode::BlockScaled => Input::BlockScaled(&blocks),
                        Mode::Int8 => Input::Int8(&int8),
                        Mode::Bf16 => Input::Bf16(&halves),
                        Mode::Panels => Input::Panels(&halves),
                    },
                    target: Target {
                        ptr: out.as_mut_ptr().add(1),
                        stride,
                        bias: (self.epilogue != Epilogue::Nothing).then_some(self.biases[0]),
                        activation,
                        residual: self.residual.map(|r| (r.as_ptr(), features)),
                    },
                    scratch: scratch.ptr(),
                });
            }
        }
        for row in out.chunks(stride) {
            assert_eq!((row[0], row[stride - 1]), (7.5, 7.5), "{tier} wrote outside its outputs");
        }
        out.chunks(stride).flat_map(|row| row[1..=features].to_vec()).collect()
    }

    /// Each output by its definition, and the sum of absolute products, which bounds rounding.
    fn expected(&self) -> Vec<(f64, f64)> {
        let x: Vec<f32> = match self.mode {
            Mode::Exact => self.x.to_vec(),
            Mode::BlockScaled => self.x.chunks(32).flat_map(rounded).collect(),
            Mode::Int8 => self.x.chunks(self.cols()).flat_map(rounded).collect(),
            Mode::Bf16 | Mode::Panels => self.x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
        };
        let sums = [0, 1].map(|i| self.sums(i, &x));
        let mut out = Vec::new();
        for (i, ((sum, size), (other, other_size))) in sums[0].iter().zip(&sums[1]).enumerate() {
            let residual = self.residual.map_or(0.0, |v| f64::from(v[i]));
            let (value, size) = match self.epilogue {
                Epilogue::Nothing | Epilogue::Bias => (*sum, *size),
                Epilogue::Gelu => (0.5 * sum * (1.0 + erf(sum / 2f64.sqrt())), *size + 1.0),
                Epilogue::Gate => (sum / (1.0 + (-sum).exp()) * other, size * other_size + size + other_size),
            };
            out.push((value + residual, size + residual.abs()));
        }
        out
    }

    fn sums(&self, which: usize, x: &[f32]) -> Vec<(f64, f64)> {
        let (cols, features, weight) = (self.cols(), self.features(), self.weights[which]);
        let mut stored = vec![0.0; cols];
        let mut out = vec![(0.0, 0.0); self.rows * features];
        for f in 0..features {
            weight.dequantise_row(f, &mut stored);
            if self.mode == Mode::Int8 {
                stored = rounded(&stored);
            }
            if self.mode == Mode::Panels {
                stored.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32());
            }
            let bias =
                if self.epilogue == Epilogue::Nothing { 0.0 } else { f64::from(self.biases[which][f]) };
            for r in 0..self.rows {
                let products = stored.iter().zip(&x[r * cols..]).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let size = products.clone().map(f64::abs).sum::<f64>() + bias.abs();
                out[r * features + f] = (products.sum::<f64>() + bias, size);
            }
        }
        out
    }

    /// Compares a tier's output with the definition.
    fn is_as_expected(&self, tier: Tier, got: &[f32], tolerance: f64) -> Result<(), TestCaseError> {
        for (i, (got, (want, size))) in got.iter().zip(self.expected()).enumerate() {
            let error = (f64::from(*got) - want).abs();
            let (what, mode, epilogue) = (self.weights[0].dtype(), self.mode, self.epilogue);
            prop_assert!(
                error <= tolerance * size + 1e-6,
                "{tier} {what} {mode:?} {epilogue:?} output {i}: {got} for {want} of {size}"
            );
        }
        Ok(())
    }

    /// Compares with the definition, and the bits of each row alone with those in the batch.
    fn check(&self, tolerance: f64) -> Result<(), TestCaseError> {
        let (cols, features) = (self.cols(), self.features());
        for tier in tiers().filter(|tier| self.mode.is_available_on(*tier)) {
            let got = self.run(tier);
            self.is_as_expected(tier, &got, tolerance)?;
            for r in 0..self.rows {
                let x = &self.x[r * cols..(r + 1) * cols];
                let residual = self.residual.map(|v| &v[r * features..(r + 1) * features]);
                let alone = ProjectionCase { x, rows: 1, residual, ..*self }.run(tier);
                prop_assert_eq!(&alone[..], &got[r * features..(r + 1) * features], "{} row {}", tier, r);
            }
        }
        Ok(())
    }

    /// Tile registers give the bits of vectors where sums are integers, and values near the definition
    /// elsewhere.
    fn check_tiles(&self) -> Result<(), TestCaseError> {
        let kernels = Kernels::of(Tier::Amx).chosen_by(TileRule::Always);
        let got = self.run_with(Tier::Amx, kernels);
        if matches!(self.mode, Mode::Bf16 | Mode::Panels) {
            return self.is_as_expected(Tier::Amx, &got, 4e-6);
        }
        let bits = |out: Vec<f32>| out.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let what = self.weights[0].dtype();
        prop_assert_eq!(bits(got), bits(self.run(Tier::Avx512Vnni)), "{} {:?}", what, self.mode);
        Ok(())
    }
}

/// The parameters of a case.
#[derive(Debug, Clone, Copy)]
struct Recipe {
    seed: u64,
    dtype: DType,
    mode: Mode,
    rows: usize,
    blocks: usize,
    features: usize,
    epilogue: Epilogue,
    add: bool,
}

impl Recipe {
    fn make(
        self,
        check: impl FnOnce(ProjectionCase<'_>) -> Result<(), TestCaseError>,
    ) -> Result<(), TestCaseError> {
        let Self { dtype, rows, features, .. } = self;
        let mut samples = Samples::new(self.seed);
        let mode = match self.mode {
            Mode::BlockScaled | Mode::Bf16 if dtype == DType::BF16 => Mode::Bf16,
            Mode::BlockScaled | Mode::Panels if !Form::of(dtype).has_block_scales() => Mode::Exact,
            Mode::Bf16 => Mode::Exact,
            mode => mode,
        };
        // Floats need not be whole blocks.
        let cols = match dtype.block_len() {
            1 => 32 * self.blocks - samples.0.next_u8() as usize % 31,
            len => len * (32 * self.blocks).div_ceil(len),
        };
        let weights = [samples.weight(dtype, features, cols), samples.weight(dtype, features, cols)];
        let biases = [0, 1].map(|_| samples.floats(features.next_multiple_of(16)));
        let (mut x, residual) = (samples.floats(rows * cols), samples.floats(rows * features));
        // A block of zeros has no scale to divide by.
        x[..cols.min(32)].fill(0.0);
        check(ProjectionCase {
            weights: [&weights[0], &weights[1]],
            biases: [&biases[0], &biases[1]],
            x: &x,
            rows,
            residual: self.add.then_some(&residual[..]),
            mode,
            epilogue: self.epilogue,
        })
    }
}

/// Cases of at most `rows` rows.
fn recipes(most_rows: usize) -> impl Strategy<Value = Recipe> {
    let modes = [Mode::Exact, Mode::BlockScaled, Mode::Int8, Mode::Bf16];
    let sizes = (1..=most_rows, 1usize..20, 1usize..70);
    let choices = (0..DType::ALL.len(), 0..modes.len(), 0..EPILOGUES.len());
    (any::<u64>(), sizes, choices, any::<bool>()).prop_map(move |(seed, sizes, choices, add)| {
        let ((rows, blocks, features), (dtype, mode, epilogue)) = (sizes, choices);
        Recipe {
            seed,
            dtype: DType::ALL[dtype],
            mode: modes[mode],
            rows,
            blocks,
            features,
            epilogue: EPILOGUES[epilogue],
            add,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn projections_follow_the_definition(recipe in recipes(27)) {
        // The minimum of an affine block is not in the integer sum, so rounded terms may exceed the products.
        recipe.make(|case| case.check(if case.mode == Mode::Exact { 2e-6 } else { 4e-6 }))?;
    }

    #[test]
    fn rows_of_bf16_follow_the_definition(recipe in recipes(14)) {
        Recipe { dtype: DType::BF16, mode: Mode::Bf16, ..recipe }.make(|case| case.check(4e-6))?;
    }
}

/// Rows that are too wide for the memory of unpacked weights, and the widest that are not, have the bits that
/// each of them has alone.
#[test]
fn the_widest_rows_have_the_bits_of_one() {
    for (blocks, dtype) in [(512, DType::Q5_0), (513, DType::Q4_1)] {
        let mode = Mode::BlockScaled;
        let epilogue = Epilogue::Nothing;
        let recipe = Recipe { seed: 5, dtype, mode, rows: 7, blocks, features: 17, epilogue, add: false };
        // Sums of so many blocks round more.
        let checked = recipe.make(|case| case.check(1e-4));
        assert!(checked.is_ok(), "{recipe:?}: {}", checked.unwrap_err());
    }
}

/// Every form on tile registers, with about sixteen rows, and odd numbers of blocks and groups.
#[test]
fn tiles_give_the_bits_of_vectors() {
    if !has_amx() {
        return;
    }
    let modes = [Mode::BlockScaled, Mode::Int8, Mode::Bf16, Mode::Panels];
    let each = modes.into_iter().flat_map(|mode| DType::ALL.map(|dtype| (mode, dtype)));
    let sizes = [(1, 3, 33), (8, 2, 16), (15, 1, 40), (16, 5, 17), (17, 4, 64), (33, 3, 20), (165, 9, 50)];
    for (i, (mode, dtype)) in each.enumerate() {
        for (j, (rows, blocks, features)) in sizes.into_iter().enumerate() {
            let epilogue = EPILOGUES[(i + j) % EPILOGUES.len()];
            let seed = (i * sizes.len() + j) as u64;
            let recipe = Recipe { seed, dtype, mode, rows, blocks, features, epilogue, add: j % 2 == 0 };
            let checked =
                recipe.make(|case| if case.mode == Mode::Exact { Ok(()) } else { case.check_tiles() });
            assert!(checked.is_ok(), "{recipe:?}: {}", checked.unwrap_err());
        }
    }
}

/// A tile register loads two blocks of eight-bit weights together, so an odd number of blocks needs padding
/// of one.
#[test]
fn int8_of_an_odd_number_of_blocks_has_padding() {
    let block = Form::Int8.block_bytes();
    let bytes = |cols| Packed::bytes_of(Form::Int8, 16, cols);
    assert_eq!(bytes(96) - bytes(64), 2 * block);
    assert_eq!(bytes(128), bytes(96));
    assert_eq!(Packed::bytes_of(Form::Q8, 16, 96) - Packed::bytes_of(Form::Q8, 16, 64), block + 64);
}

/// The quantised values of numbers that share a scale, by the definition, in f64 where it matters.
fn rounded(x: &[f32]) -> Vec<f32> {
    let largest = x.iter().fold(0f32, |a, v| a.max(v.abs()));
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    x.iter()
        .map(|v| (f64::from((v * inverse).round_ties_even()) * f64::from(largest) / 127.0) as f32)
        .collect()
}

/// The error function by its series, which is exact enough for small numbers; ±1 for others.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}
