//! The `<architecture>.*` keys of a GGUF file, with a record of those that were read. The configuration of a
//! checkpoint is brought into the same keys, with lists that GGUF files do not have.
//!
//! A key that no code reads may still change what the model computes, so [`ArchKeys::all_read`] refuses it by
//! name, as `TensorFinder::all_used` does for tensors.

use super::rope::Scaling;
use crate::gguf::{GgufProblem, Metadata};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Keys that cannot change a result, at any value.
const WITHOUT_EFFECT: [&str; 3] = [
    // What the scaling of rotary positions is computed from, where the file has one.
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    // These architectures have RMS norms only; llama.cpp does not read the key for them either.
    "attention.layer_norm_epsilon",
];

/// Keys that change what a model computes, with the only values at which they change nothing.
const NEUTRAL: [(&str, Neutral); 17] = [
    ("attention.causal", Neutral::Bool(true)),
    ("attention.clamp_kqv", Neutral::Number(&[0.0])),
    ("attention.max_alibi_bias", Neutral::Number(&[0.0])),
    ("attention.scale", Neutral::Number(&[0.0])),
    ("attention.sliding_window", Neutral::Zero),
    ("attn_logit_softcapping", Neutral::Number(&[0.0])),
    ("embedding_scale", Neutral::Number(&[1.0, 0.0])),
    ("expert_count", Neutral::Zero),
    ("expert_shared_count", Neutral::Zero),
    ("expert_used_count", Neutral::Zero),
    ("final_logit_softcapping", Neutral::Number(&[0.0])),
    ("leading_dense_block_count", Neutral::Zero),
    ("logit_scale", Neutral::Number(&[1.0, 0.0])),
    ("pooling_type", Neutral::Zero),
    ("residual_scale", Neutral::Number(&[1.0, 0.0])),
    ("rope.scale_linear", Neutral::Number(&[1.0, 0.0])),
    ("use_parallel_residual", Neutral::Bool(false)),
];

/// A value at which a key has no effect. Some numbers have two: one without effect, and 0 for "not set".
#[derive(Clone, Copy)]
enum Neutral {
    Bool(bool),
    Number(&'static [f32]),
    Zero,
}

/// The keys of one architecture.
pub(super) struct ArchKeys<'a> {
    meta: &'a Metadata,
    architecture: &'a str,
    config: Option<&'a ConfigKeys>,
    read: RefCell<BTreeSet<String>>,
}

/// What the configuration of a checkpoint says beyond keys.
#[derive(Debug, Clone)]
pub(crate) struct ConfigKeys {
    /// Of all layers, or of those without a window where these have a rotation of their own.
    pub(crate) scaling: Scaling,
    /// For each layer, whether its attention has a window; `None` where the architecture decides.
    pub(crate) windowed: Option<Vec<bool>>,
    /// For each layer, whether queries and keys are rotated; `None`: of all layers.
    pub(crate) rotated: Option<Vec<bool>>,
}

impl<'a> ArchKeys<'a> {
    pub(super) fn new(meta: &'a Metadata, architecture: &'a str) -> Self {
        Self { meta, architecture, config: None, read: RefCell::default() }
    }

    /// The keys of a checkpoint.
    pub(super) fn of_config(meta: &'a Metadata, architecture: &'a str, config: &'a ConfigKeys) -> Self {
        Self { config: Some(config), ..Self::new(meta, architecture) }
    }

    /// What a checkpoint's configuration says beyond keys; `None` in a GGUF file.
    pub(super) fn config(&self) -> Option<&'a ConfigKeys> {
        self.config
    }

    /// The full name of the key in the file. The key counts as read from now on.
    pub(super) fn name(&self, key: &str) -> String {
        let name = format!("{}.{key}", self.architecture);
        self.read.borrow_mut().insert(name.clone());
        name
    }

    /// Notes that other code reads a key.
    pub(super) fn read_elsewhere(&self, key: &str) {
        self.name(key);
    }

    /// A problem with the value of a key.
    pub(super) fn invalid(&self, key: &str, why: String) -> GgufProblem {
        GgufProblem::BadValue { key: self.name(key), why }
    }

    /// A count of at least 1 that must be there.
    pub(super) fn size(&self, key: &str) -> Result<usize, GgufProblem> {
        self.meta.size(&self.name(key))
    }

    /// A count of at least 1 that may be left out.
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, GgufProblem> {
        if self.meta.has(&self.name(key)) { self.size(key).map(Some) } else { Ok(None) }
    }

    /// A count that may be left out; nought means the same.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>, GgufProblem> {
        match self.meta.opt_unsigned(&self.name(key))? {
            None | Some(0) => Ok(None),
            Some(_) => self.size(key).map(Some),
        }
    }

    /// A finite number that must be there.
    pub(super) fn float(&self, key: &str) -> Result<f32, GgufProblem> {
        self.meta.float(&self.name(key))
    }

    /// A finite number that may be left out.
    pub(super) fn optional_float(&self, key: &str) -> Result<Option<f32>, GgufProblem> {
        self.meta.opt_float(&self.name(key))
    }

    /// Refuses a text under `key` other than `only`.
    pub(super) fn only_text(&self, key: &str, only: Option<&str>) -> Result<(), GgufProblem> {
        let found = self.meta.opt_string(&self.name(key))?;
        match found.filter(|found| Some(*found) != only) {
            None => Ok(()),
            Some(found) => Err(self.invalid(
                key,
                match only {
                    Some(only) => format!("{found:?} is not supported; only {only:?} is"),
                    None => format!("{found:?} is not supported"),
                },
            )),
        }
    }

    /// The text under `key`, which may be left out and must be one of `supported`.
    pub(super) fn one_of_texts(
        &self,
        key: &str,
        supported: &[&'static str],
    ) -> Result<Option<&'static str>, GgufProblem> {
        let Some(found) = self.meta.opt_string(&self.name(key))? else { return Ok(None) };
        match supported.iter().find(|text| **text == found) {
            Some(text) => Ok(Some(text)),
            None => {
                let why = format!("{found:?} is not supported; supported: {}", supported.join(", "));
                Err(self.invalid(key, why))
            }
        }
    }

    /// A problem for a key that must be there because of another one.
    pub(super) fn missing(&self, key: &str) -> GgufProblem {
        GgufProblem::MissingKey { key: self.name(key) }
    }

    /// Refuses every key of [`NEUTRAL`] that has an effect, except those that the architecture honours.
    pub(super) fn refuse_effects(&self, honoured: &[&str]) -> Result<(), GgufProblem> {
        let mut others = NEUTRAL.iter().filter(|(key, _)| !honoured.contains(key));
        others.try_for_each(|(key, neutral)| self.refuse_effect(key, *neutral))
    }

    fn refuse_effect(&self, key: &str, neutral: Neutral) -> Result<(), GgufProblem> {
        let name = self.name(key);
        let refused = match neutral {
            Neutral::Bool(only) => {
                let found = self.meta.opt_bool(&name)?.filter(|found| *found != only);
                found.map(|found| (found.to_string(), only.to_string()))
            }
            Neutral::Number(values) => {
                let found = self.meta.opt_float(&name)?.filter(|found| !values.contains(found));
                found.map(|found| (found.to_string(), values[0].to_string()))
            }
            Neutral::Zero => {
                let found = self.meta.opt_unsigned(&name)?.filter(|found| *found != 0);
                found.map(|found| (found.to_string(), "0".to_owned()))
            }
        };
        match refused {
            None => Ok(()),
            Some((found, only)) => {
                Err(self.invalid(key, format!("{found} is not supported; only {only} is")))
            }
        }
    }

    /// Refuses a file with a key of this architecture that no code reads.
    pub(super) fn all_read(&self) -> Result<(), GgufProblem> {
        let read = self.read.borrow();
        let own = |key: &&str| {
            let name = key.strip_prefix(self.architecture).and_then(|rest| rest.strip_prefix('.'));
            name.is_some_and(|name| !read.contains(*key) && !WITHOUT_EFFECT.contains(&name))
        };
        match self.meta.keys().find(own) {
            None => Ok(()),
            Some(key) => Err(GgufProblem::UnreadKey {
                key: key.to_owned(),
                group: format!("the {} architecture", self.architecture),
            }),
        }
    }
}
