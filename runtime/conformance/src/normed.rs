//! A small encoder whose parts norm their input, as ModernBERT's do: some normed rows have one reader, others
//! are residuals too.

use std::sync::Arc;

use trustformers_plan::{DType, FusedOps, Hyper, KvType, Numerics, PlanBuilder, Pooling, Value, Weights};

use crate::CaseError;
use crate::harness::LoadCase;
use crate::models::{ENCODER_LIMITS, Encoder, Maker, VOCABULARY, named};

/// The encoder. It has layer norms, and root-mean-square norms in its second layer.
#[derive(Debug, Clone, Copy)]
pub struct NormedEncoder {
    /// The stored type of its matrices. Norms are always F32.
    pub dtype: DType,
}

impl NormedEncoder {
    /// Its sizes: those of [`Encoder`].
    const HYPER: Hyper = Encoder::HYPER;
    const HIDDEN: usize = 160;

    /// Its weights and its plan with these fused forms.
    ///
    /// # Errors
    /// Only by a fault of this crate, or of a pass.
    pub fn case(&self, fused: &FusedOps, numerics: Numerics) -> Result<LoadCase, CaseError> {
        let weights = self.weights()?;
        let mut b = PlanBuilder::new(&weights, Self::HYPER, ENCODER_LIMITS);
        let mut x = b.embed(named(&weights, "words")?);
        for layer in 0..Self::HYPER.layers {
            x = layer_of(&mut b, &weights, layer, x)?;
        }
        b.pool(x, Pooling::Mean, true);
        let plan = b.finish(fused)?;
        Ok(LoadCase { weights, plan, kv_type: KvType::F32, numerics })
    }

    fn weights(&self) -> Result<Arc<Weights>, CaseError> {
        let Hyper { width, layers, .. } = Self::HYPER;
        let mut made = Maker::seeded(67);
        made.matrix("words", self.dtype, VOCABULARY, width)?;
        for layer in 0..layers {
            for name in ["a", "gate", "up"] {
                made.matrix(&format!("{layer}.{name}"), self.dtype, Self::HIDDEN, width)?;
            }
            for name in ["b", "down"] {
                made.matrix(&format!("{layer}.{name}"), self.dtype, width, Self::HIDDEN)?;
            }
            for name in ["norm1", "norm2"] {
                made.vector(&format!("{layer}.{name}"), width, 1.0, 0.25)?;
                made.vector(&format!("{layer}.{name}.bias"), width, 0.0, 0.2)?;
            }
        }
        Ok(Arc::new(made.weights))
    }
}

fn layer_of(b: &mut PlanBuilder<'_>, weights: &Weights, layer: usize, x: Value) -> Result<Value, CaseError> {
    let at = |name: &str| named(weights, &format!("{layer}.{name}"));
    let norm = |b: &mut PlanBuilder<'_>, x, name: &str| -> Result<Value, CaseError> {
        let (weight, bias) = (at(name)?, at(&format!("{name}.bias"))?);
        Ok(if layer == 0 { b.layer_norm(x, weight, bias, 1e-5) } else { b.rms_norm(x, weight, 1e-5) })
    };
    // One projection reads these rows.
    let n = norm(b, x, "norm1")?;
    let hidden = b.matmul(n, at("a")?);
    let hidden = b.gelu(hidden);
    let part = b.matmul(hidden, at("b")?);
    let x = b.add(part, x);
    // Two projections read these, and they are the residual of a third.
    let n = norm(b, x, "norm2")?;
    let (gate, up) = (b.matmul(n, at("gate")?), b.matmul(n, at("up")?));
    let hidden = b.silu_mul(gate, up);
    let part = b.matmul(hidden, at("down")?);
    Ok(b.add(part, n))
}
