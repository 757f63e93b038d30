//! Rotary positions in a `config.json`: `rope_parameters` of transformers 5, or `rope_theta` and
//! `rope_scaling` of the versions before it.

use super::{DecoderConfig, Reader};
use crate::arch::{ConfigKeys, Scaling, yarn_magnitude};
use crate::checkpoint::CheckpointProblem;
use serde_json::{Map, Value};
use std::cell::RefCell;

const PARAMETERS: &str = "rope_parameters";
const SCALING: &str = "rope_scaling";

/// Layers without a window, and those with one, where their parameters stand apart.
const FULL: &str = "full_attention";
const WINDOWED: &str = "sliding_attention";

/// What a configuration says beyond keys before any of it is read.
pub(super) fn unscaled() -> ConfigKeys {
    ConfigKeys { scaling: Scaling::None, windowed: None, rotated: None }
}

impl DecoderConfig {
    pub(super) fn read_rotation(&mut self, reader: &Reader<'_>) -> Result<(), CheckpointProblem> {
        let mut base = reader.number("rope_theta")?;
        let mut window_base = reader.number("rope_local_base_freq")?;
        let mut share = reader.number("partial_rotary_factor")?;
        if let Some(parameters) = reader.object(PARAMETERS)?.or(reader.object(SCALING)?) {
            let mut own = parameters;
            if let Some(full) = parameters.get(FULL).and_then(Value::as_object) {
                own = full;
                let windowed = parameters.get(WINDOWED).and_then(Value::as_object);
                window_base = self.window_base(windowed)?.or(window_base);
            }
            let own = Reader { content: own, read: RefCell::default() };
            base = own.number("rope_theta")?.or(base);
            share = own.number("partial_rotary_factor")?.or(share);
            self.keys.scaling = scaling(&own, reader)?;
            own.all_read(PARAMETERS)?;
        }
        reader.note("original_max_position_embeddings");
        if let Some(base) = base {
            self.set_number("rope.freq_base", "rope_theta", base);
        }
        if let Some(base) = window_base {
            self.set_number("rope.freq_base_swa", "rope_local_base_freq", base);
        }
        if let Some(share) = share.filter(|share| *share != 1.0) {
            let head = match reader.optional_size("head_dim")? {
                Some(head) => head,
                None => reader.size("hidden_size")? / reader.size("num_attention_heads")?,
            };
            // The reference truncates as well.
            let dims = (head as f64 * share) as u64;
            self.set_size("rope.dimension_count", "partial_rotary_factor", dims);
        }
        Ok(())
    }

    /// The base of windowed layers, which must not be scaled.
    fn window_base(&self, windowed: Option<&Map<String, Value>>) -> Result<Option<f64>, CheckpointProblem> {
        let Some(content) = windowed else { return Ok(None) };
        let own = Reader { content, read: RefCell::default() };
        let base = own.number("rope_theta")?;
        let kind = own.text("rope_type")?.unwrap_or("default");
        if kind != "default" {
            let why = format!("{WINDOWED} has the rope_type {kind:?}; only \"default\" is supported");
            return Err(CheckpointProblem::key(PARAMETERS, why));
        }
        own.all_read(PARAMETERS)?;
        Ok(base)
    }
}

/// The scaling that an object of parameters describes.
fn scaling(own: &Reader<'_>, config: &Reader<'_>) -> Result<Scaling, CheckpointProblem> {
    let kind = match own.text("rope_type")? {
        Some(kind) => kind,
        None => own.text("type")?.unwrap_or("default"),
    };
    own.note("type");
    let needed = |key: &'static str| -> Result<f32, CheckpointProblem> {
        match own.number(key)? {
            Some(value) if value > 0.0 => Ok(value as f32),
            _ => {
                Err(CheckpointProblem::key(key, format!("a number above 0 is needed by rope_type {kind:?}")))
            }
        }
    };
    let original = || -> Result<usize, CheckpointProblem> {
        let key = "original_max_position_embeddings";
        match own.optional_size(key)?.or(config.optional_size(key)?) {
            Some(size) if size > 0 => Ok(size),
            _ => config.size("max_position_embeddings"),
        }
    };
    let magnitude = own.number("attention_factor")?.map(|value| value as f32);
    match kind {
        "default" => {
            own.note("original_max_position_embeddings");
            Ok(Scaling::None)
        }
        "linear" => Ok(Scaling::Linear { factor: needed("factor")? }),
        "llama3" => Ok(Scaling::Llama3 {
            factor: needed("factor")?,
            low_factor: needed("low_freq_factor")?,
            high_factor: needed("high_freq_factor")?,
            original: original()?,
        }),
        "yarn" => {
            if own.truth("truncate")? == Some(false) {
                return Err(CheckpointProblem::key(
                    "truncate",
                    "false is not supported; only true is".to_owned(),
                ));
            }
            let factor = needed("factor")?;
            Ok(Scaling::Yarn {
                factor,
                beta_fast: own.number("beta_fast")?.unwrap_or(32.0) as f32,
                beta_slow: own.number("beta_slow")?.unwrap_or(1.0) as f32,
                original: original()?,
                magnitude: magnitude.unwrap_or_else(|| yarn_magnitude(factor)),
            })
        }
        "longrope" | "su" => {
            let (original, context) = (original()?, config.size("max_position_embeddings")?);
            let extended = own.number("factor")?.unwrap_or(context as f64 / original as f64);
            let magnitude = magnitude.unwrap_or_else(|| long_magnitude(extended, original));
            let (short, long) = (divisors(own, "short_factor")?, divisors(own, "long_factor")?);
            Ok(Scaling::Long { short, long, original, magnitude })
        }
        other => {
            let why = format!(
                "rope_type {other:?} is not supported; supported: default, linear, llama3, yarn, longrope"
            );
            Err(CheckpointProblem::key(PARAMETERS, why))
        }
    }
}

/// The magnitude of LongRoPE for a context that was extended so many times.
fn long_magnitude(extended: f64, original: usize) -> f32 {
    if extended <= 1.0 { 1.0 } else { (1.0 + extended.ln() / (original as f64).ln()).sqrt() as f32 }
}

fn divisors(own: &Reader<'_>, key: &'static str) -> Result<Vec<f32>, CheckpointProblem> {
    let list = own.list(key)?.ok_or_else(|| CheckpointProblem::key(key, "it is missing".to_owned()))?;
    let number = |value: &Value| value.as_f64().filter(|v| v.is_finite() && *v > 0.0).map(|v| v as f32);
    let numbers: Option<Vec<f32>> = list.iter().map(number).collect();
    numbers.ok_or_else(|| CheckpointProblem::key(key, "it is no list of numbers above 0".to_owned()))
}
