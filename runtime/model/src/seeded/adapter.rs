//! Small adapters (LoRA) of a seeded model, as PEFT writes them.

use super::{SCALE, SeededModel, element, fnv1a};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// Scale of the matrices `lora_B`: a change of about the size of the product.
const UP_SCALE: f32 = 0.5;

/// An adapter whose values depend on nothing but a seed. Element `i` of a tensor is that of the model's
/// recipe, under the name that the tensor has in the file; `lora_A` is scaled as a matrix of the model,
/// `lora_B` by one half.
#[derive(Debug, Clone, PartialEq)]
pub struct SeededAdapter {
    /// The model that it belongs to.
    pub model: SeededModel,
    /// The seed of all values.
    pub seed: u64,
    /// Rows of every `lora_A`.
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: u32,
    /// `use_rslora`: whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub stabilised: bool,
    /// The projections that it changes, such as `q_proj`.
    pub projections: Vec<&'static str>,
}

impl SeededAdapter {
    /// Every projection of a layer.
    pub const PROJECTIONS: [&'static str; 7] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    /// An adapter of rank 4 for all projections of a model.
    pub fn of(model: SeededModel, seed: u64) -> Self {
        let projections = Self::PROJECTIONS.to_vec();
        Self { model, seed, rank: 4, alpha: 8, stabilised: false, projections }
    }

    /// Writes the files into `folder`, which must exist.
    ///
    /// # Errors
    /// When a file cannot be written.
    ///
    /// # Panics
    /// As [`Self::files`].
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        self.files().into_iter().try_for_each(|(name, content)| std::fs::write(folder.join(name), content))
    }

    /// Every file's bytes by its name.
    ///
    /// # Panics
    /// For the name of a projection that no layer has.
    pub fn files(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.stabilised,
            "target_modules": self.projections,
            "bias": "none",
            "lora_dropout": 0.0,
        });
        BTreeMap::from([
            ("adapter_config.json", config.to_string().into_bytes()),
            ("adapter_model.safetensors", self.weights()),
        ])
    }

    fn weights(&self) -> Vec<u8> {
        let mut tensors: Vec<(String, [usize; 2], Vec<u8>)> = Vec::new();
        for layer in 0..self.model.layers {
            for projection in &self.projections {
                let block = if ["gate_proj", "up_proj", "down_proj"].contains(projection) {
                    "mlp"
                } else {
                    "self_attn"
                };
                let module = format!("base_model.model.model.layers.{layer}.{block}.{projection}");
                let (rows, cols) = self.shape(projection);
                let root = (cols as f32).sqrt();
                let (down, up) = (format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight"));
                tensors.push(self.tensor(down, [self.rank, cols], SCALE / root));
                tensors.push(self.tensor(up, [rows, self.rank], UP_SCALE));
            }
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes);
            (name.clone(), view.expect("the bytes were made for the shape"))
        });
        safetensors::serialize(views, None).expect("names and sizes are in order")
    }

    fn tensor(&self, name: String, shape: [usize; 2], scale: f32) -> (String, [usize; 2], Vec<u8>) {
        let start = self.seed ^ fnv1a(&name);
        let count = shape[0] * shape[1];
        let values = (0..count as u64).map(|i| element(start, i) * scale);
        (name, shape, values.flat_map(f32::to_le_bytes).collect())
    }

    /// Rows and columns of a projection.
    fn shape(&self, projection: &str) -> (usize, usize) {
        let SeededModel { heads, kv_heads, head_dim, feed_forward, .. } = self.model;
        let (width, kv) = (heads * head_dim, kv_heads * head_dim);
        match projection {
            "q_proj" | "o_proj" => (width, width),
            "k_proj" | "v_proj" => (kv, width),
            "gate_proj" | "up_proj" => (feed_forward, width),
            "down_proj" => (width, feed_forward),
            other => panic!("no layer has a projection {other}"),
        }
    }
}
