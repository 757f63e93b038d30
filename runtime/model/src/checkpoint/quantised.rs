//! Checkpoints whose weights are quantised: FP8, GPTQ, AWQ and compressed-tensors. Each module of such a
//! checkpoint has a packed tensor with scales beside it, which become one tensor that a plan can use, of the
//! same values:
//!
//! | stored | becomes |
//! |---|---|
//! | four bits, the zero in the middle | `Q4_0` |
//! | four bits, other zeros | `Q5_0` |
//! | eight bits, the zero in the middle | `Q8_0` |
//! | `F8_E4M3`, where each product with its scale has at most eight bits | `BF16` |
//! | all others, also a scale that f16 does not have, and groups of other than whole 32 columns | `F32` |
//!
//! Only weights are read so. Other runtimes may also round activations, as `quantization_config` says; a
//! plan's activations are those of its backend.

mod fp8;
mod integers;
mod settings;

pub(crate) use settings::Quantisation;

use super::{CheckpointProblem, Shard, StoredTensor, StoredTensors};
use crate::arch::TensorProblem;
use half::f16;
use std::collections::BTreeMap;
use std::sync::Arc;
use trustformers_plan::{DType, MatrixShape, WeightBytes};

/// The tensors of a module that are read together, by the last part of their names.
const MEMBERS: [&str; 14] = [
    "weight",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "output_scale",
    "activation_scale",
];

/// Of activations, which are not rounded here.
const OF_ACTIVATIONS: [&str; 3] = ["input_scale", "output_scale", "activation_scale"];

/// A tensor that cannot be unpacked, and its file.
#[derive(Debug)]
pub(crate) struct PackedProblem {
    /// The file below the checkpoint's folder.
    pub(crate) file: String,
    pub(crate) problem: CheckpointProblem,
}

/// A tensor of a module with its file.
struct Member {
    file: String,
    name: String,
    tensor: StoredTensor,
    source: WeightBytes,
}

impl Member {
    fn bytes(&self) -> &[u8] {
        let file: &[u8] = (*self.source).as_ref();
        file.get(self.tensor.range.clone()).unwrap_or_default()
    }

    fn shape(&self) -> MatrixShape {
        self.tensor.matrix.into()
    }

    fn wrong(&self, why: String) -> PackedProblem {
        let problem = TensorProblem { name: self.name.clone(), why };
        PackedProblem { file: self.file.clone(), problem: CheckpointProblem::Tensor(problem) }
    }

    /// Refuses a tensor of another type.
    fn of_type(&self, stored: &str) -> Result<(), PackedProblem> {
        let found = &self.tensor.stored_as;
        if found == stored {
            return Ok(());
        }
        Err(self.wrong(format!("it is stored as {found}; {stored} was expected in this place")))
    }

    /// Refuses a tensor of another shape.
    fn of_shape(&self, shape: MatrixShape) -> Result<(), PackedProblem> {
        let found = self.shape();
        if found == shape {
            return Ok(());
        }
        let (rows, cols) = (shape.rows, shape.cols);
        Err(self.wrong(format!(
            "it is {} x {}, and {rows} x {cols} fits the other tensors of its module; download the checkpoint again",
            found.rows, found.cols
        )))
    }

    /// The numbers of 32 bits that it is, by position.
    fn words(&self) -> Result<Words<'_>, PackedProblem> {
        self.of_type("I32")?;
        Ok(Words(self.bytes()))
    }

    /// Its values, which are scales.
    fn floats(&self) -> Result<Vec<f32>, PackedProblem> {
        let bytes = self.bytes();
        let values: Vec<f32> = match (self.tensor.dtype, self.tensor.stored_as.as_str()) {
            (Some(dtype), _) => {
                let mut values = vec![0.0; bytes.len() / dtype.block_bytes()];
                dtype.dequantise(bytes, &mut values);
                values
            }
            // A byte is an exponent, as in MXFP4.
            (None, "F8_E8M0") => {
                bytes.iter().map(|exponent| 2.0_f64.powi(i32::from(*exponent) - 127) as f32).collect()
            }
            (None, other) => {
                return Err(
                    self.wrong(format!("it is stored as {other}; scales are F32, F16, BF16 or F8_E8M0"))
                );
            }
        };
        match values.iter().find(|value| !value.is_finite()) {
            None => Ok(values),
            Some(value) => {
                Err(self.wrong(format!("it has the scale {value}; download the checkpoint again")))
            }
        }
    }
}

/// Numbers of 32 bits in little endian.
#[derive(Clone, Copy)]
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn at(self, index: usize) -> u32 {
        let bytes = self.0.get(index * 4..index * 4 + 4);
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    }
}

/// The tensors of one module.
struct PackedModule {
    name: String,
    members: BTreeMap<&'static str, Member>,
}

impl PackedModule {
    fn is_packed(&self) -> bool {
        let of_weights = |member: &Member| member.tensor.dtype.is_none();
        ["qweight", "weight_packed"].iter().any(|name| self.members.contains_key(name))
            || self.members.get("weight").is_some_and(of_weights)
    }

    fn take(&mut self, name: &str) -> Option<Member> {
        self.members.remove(name)
    }

    /// The tensor that belongs to `packed`.
    fn need(&mut self, name: &str, packed: &Member) -> Result<Member, PackedProblem> {
        self.take(name).ok_or_else(|| {
            packed.wrong(format!(
                "{}.{name} is missing beside it; download all files of the checkpoint",
                self.name
            ))
        })
    }

    /// Refuses a module with a tensor that was not read.
    fn all_read(&self, method: &str) -> Result<(), PackedProblem> {
        match self.members.iter().find(|(name, _)| !OF_ACTIVATIONS.contains(name)) {
            None => Ok(()),
            Some((_, member)) => Err(member.wrong(format!(
                "it is not part of {method} as it is supported here; without it the model would answer wrongly"
            ))),
        }
    }
}

/// A tensor that a plan can use.
struct Unpacked {
    dtype: DType,
    shape: MatrixShape,
    bytes: Vec<u8>,
}

/// Replaces the packed tensors of all files by tensors of their values, which lie in memory.
pub(crate) fn unpack(quantisation: &Quantisation, shards: &mut Vec<Shard>) -> Result<(), PackedProblem> {
    let mut unpacked = Vec::new();
    for mut module in packed_modules(shards) {
        let Some(file) = module.members.values().next().map(|member| member.file.clone()) else { continue };
        let Unpacked { dtype, shape, bytes } = quantisation.unpack(&mut module)?;
        module.all_read(quantisation.method())?;
        let tensor = StoredTensor {
            dtype: Some(dtype),
            stored_as: dtype.name().to_owned(),
            matrix: (shape.rows, shape.cols),
            range: 0..bytes.len(),
        };
        let tensors = BTreeMap::from([(format!("{}.weight", module.name), tensor)]);
        unpacked.push(Shard { name: file, stored: StoredTensors { source: Arc::new(bytes), tensors } });
    }
    shards.extend(unpacked);
    Ok(())
}

/// Takes the tensors of all packed modules out of their files. Those of one module may lie in several files.
fn packed_modules(shards: &mut [Shard]) -> Vec<PackedModule> {
    let mut modules: BTreeMap<String, PackedModule> = BTreeMap::new();
    for Shard { name: file, stored } in shards.iter() {
        for (name, tensor) in &stored.tensors {
            let Some((module, last)) = name.rsplit_once('.') else { continue };
            let Some(own) = MEMBERS.iter().find(|member| **member == last) else { continue };
            let member = Member {
                file: file.clone(),
                name: name.clone(),
                tensor: tensor.clone(),
                source: Arc::clone(&stored.source),
            };
            let module = modules
                .entry(module.to_owned())
                .or_insert_with(|| PackedModule { name: module.to_owned(), members: BTreeMap::new() });
            module.members.insert(*own, member);
        }
    }
    modules.retain(|_, module| module.is_packed());
    for Shard { stored, .. } in shards.iter_mut() {
        stored.tensors.retain(|name, _| {
            let own = name.rsplit_once('.').filter(|(_, last)| MEMBERS.contains(last));
            !own.is_some_and(|(module, _)| modules.contains_key(module))
        });
    }
    modules.into_values().collect()
}

/// Whether f16 has this number.
fn is_half(value: f32) -> bool {
    f16::from_f32(value).to_f32() == value
}

#[cfg(test)]
mod tests;
