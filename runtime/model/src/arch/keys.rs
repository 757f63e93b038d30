//! The `<architecture>.*` keys of a GGUF file, with a record of those that were read.
//!
//! A key that no code reads may still change what the model computes, so [`ArchKeys::all_read`] refuses it by
//! name, as `TensorFinder::all_used` does for tensors.

use crate::gguf::{GgufProblem, Metadata};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Keys that cannot change a result, at any value.
const WITHOUT_EFFECT: [&str; 3] = [
    // They describe a scaling of rotary positions, and every scaling is refused.
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    // These architectures have RMS norms only; llama.cpp does not read the key for them either.
    "attention.layer_norm_epsilon",
];

/// Keys that change what a model computes, with the only values at which they change nothing.
const NEUTRAL: [(&str, Neutral); 20] = [
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
    ("rope.scaling.attn_factor", Neutral::Number(&[1.0])),
    ("rope.scaling.factor", Neutral::Number(&[1.0, 0.0])),
    ("rope.scaling.type", Neutral::Text("none")),
    ("use_parallel_residual", Neutral::Bool(false)),
];

/// A value at which a key has no effect. Some numbers have two: one without effect, and 0 for "not set".
#[derive(Clone, Copy)]
enum Neutral {
    Bool(bool),
    Number(&'static [f32]),
    Text(&'static str),
    Zero,
}

/// The keys of one architecture.
pub(super) struct ArchKeys<'a> {
    meta: &'a Metadata,
    architecture: &'a str,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> ArchKeys<'a> {
    pub(super) fn new(meta: &'a Metadata, architecture: &'a str) -> Self {
        Self { meta, architecture, read: RefCell::default() }
    }

    /// The full name of the key in the file. The key counts as read from now on.
    pub(super) fn name(&self, key: &str) -> String {
        let name = format!("{}.{key}", self.architecture);
        self.read.borrow_mut().insert(name.clone());
        name
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

    /// Refuses every key of [`NEUTRAL`] that has an effect.
    pub(super) fn refuse_effects(&self) -> Result<(), GgufProblem> {
        NEUTRAL.iter().try_for_each(|(key, neutral)| self.refuse_effect(key, *neutral))
    }

    fn refuse_effect(&self, key: &str, neutral: Neutral) -> Result<(), GgufProblem> {
        let name = self.name(key);
        let refused = match neutral {
            Neutral::Text(only) => return self.only_text(key, Some(only)),
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
