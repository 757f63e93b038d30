//! Settings of sampling that a model's files recommend. They stand where a request leaves a setting out.

use crate::gguf::Metadata;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// What a model's files recommend; `None` where they say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplingSettings {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Share of probability that is sampled from.
    pub top_p: Option<f32>,
    /// Samples from this many best tokens only; 0: from all.
    pub top_k: Option<u32>,
    /// Least share of the best token's probability.
    pub min_p: Option<f32>,
    /// Share of probability of the tokens with typical surprise.
    pub typical_p: Option<f32>,
    /// Above 1: repeats less.
    pub repetition_penalty: Option<f32>,
}

/// The names of the settings in a file.
struct Keys {
    temperature: &'static str,
    top_p: &'static str,
    top_k: &'static str,
    min_p: &'static str,
    /// GGUF has none.
    typical_p: Option<&'static str>,
    repetition_penalty: &'static str,
}

const CONFIG: Keys = Keys {
    temperature: "temperature",
    top_p: "top_p",
    top_k: "top_k",
    min_p: "min_p",
    typical_p: Some("typical_p"),
    repetition_penalty: "repetition_penalty",
};

const GGUF: Keys = Keys {
    temperature: "general.sampling.temp",
    top_p: "general.sampling.top_p",
    top_k: "general.sampling.top_k",
    min_p: "general.sampling.min_p",
    typical_p: None,
    repetition_penalty: "general.sampling.penalty_repeat",
};

/// Shares of probability from which something can be sampled.
const SHARE: RangeInclusive<f64> = 1e-6..=1.0;

impl SamplingSettings {
    /// The settings in `generation_config.json`. Where it says that the model does not sample, only the
    /// penalty counts, as in the library that writes it.
    pub(crate) fn of_config(content: &Map<String, Value>, warnings: &mut Vec<String>) -> Self {
        let number = |key: &str| content.get(key).map(|value| value.as_f64().unwrap_or(f64::NAN));
        let own = Self::read(&CONFIG, number, warnings);
        match content.get("do_sample") {
            Some(Value::Bool(false)) => {
                Self { repetition_penalty: own.repetition_penalty, ..Self::default() }
            }
            _ => own,
        }
    }

    /// The settings in a GGUF file.
    pub(crate) fn of_gguf(meta: &Metadata, warnings: &mut Vec<String>) -> Self {
        let number = |key: &str| {
            let count = || meta.opt_unsigned(key).map(|count| count.map(|count| count as f64));
            meta.opt_float(key)
                .map(|float| float.map(f64::from))
                .or_else(|_| count())
                .unwrap_or(Some(f64::NAN))
        };
        Self::read(&GGUF, number, warnings)
    }

    /// Settings outside of what a request may ask for are left out, with a warning.
    fn read(keys: &Keys, number: impl Fn(&str) -> Option<f64>, warnings: &mut Vec<String>) -> Self {
        let mut take = |key: &str, range: RangeInclusive<f64>| {
            let value = number(key)?;
            if range.contains(&value) {
                return Some(value as f32);
            }
            let (low, high) = (range.start(), range.end());
            warnings.push(format!(
                "key {key}: the recommended setting is not a number from {low} to {high} and is not used"
            ));
            None
        };
        Self {
            temperature: take(keys.temperature, 0.0..=100.0),
            top_p: take(keys.top_p, SHARE),
            // The vocabularies of models have fewer tokens.
            top_k: take(keys.top_k, 0.0..=16_777_216.0).map(|count| count as u32),
            min_p: take(keys.min_p, 0.0..=1.0),
            typical_p: keys.typical_p.and_then(|key| take(key, SHARE)),
            repetition_penalty: take(keys.repetition_penalty, 0.01..=10.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;
    use crate::gguf::GgufValue;
    use crate::seeded::SeededModel;
    use serde_json::json;
    use std::path::Path;
    use std::sync::Arc;

    fn config(content: &Value) -> (SamplingSettings, Vec<String>) {
        let mut warnings = Vec::new();
        let content = content.as_object().cloned().unwrap_or_default();
        (SamplingSettings::of_config(&content, &mut warnings), warnings)
    }

    #[test]
    fn settings_of_a_configuration_are_read() {
        let (own, warnings) = config(&json!({
            "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "typical_p": 0.5,
            "repetition_penalty": 1.05, "do_sample": true, "max_length": 7
        }));
        let expected = SamplingSettings {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            min_p: Some(0.0),
            typical_p: Some(0.5),
            repetition_penalty: Some(1.05),
        };
        assert_eq!((own, warnings), (expected, Vec::new()));
        let greedy = json!({"do_sample": false, "temperature": 0.6, "repetition_penalty": 1.05});
        let penalty = SamplingSettings { repetition_penalty: Some(1.05), ..SamplingSettings::default() };
        assert_eq!(config(&greedy).0, penalty);
    }

    #[test]
    fn settings_that_no_request_may_have_are_left_out_with_a_warning() {
        let (own, warnings) = config(&json!({"temperature": -1, "top_p": 0, "top_k": "many", "min_p": 0.1}));
        assert_eq!(own, SamplingSettings { min_p: Some(0.1), ..SamplingSettings::default() });
        assert_eq!(warnings.len(), 3);
        assert!(
            warnings[0].contains("key temperature: the recommended setting is not a number from 0 to 100")
        );
    }

    #[test]
    fn settings_of_a_gguf_file_are_read() {
        let file = SeededModel::default().gguf_with(&[
            ("general.sampling.temp", GgufValue::F32(0.25)),
            ("general.sampling.top_k", GgufValue::U32(64)),
            ("general.sampling.penalty_repeat", GgufValue::F32(100.0)),
        ]);
        let model = Model::from_bytes(Path::new("m.gguf"), Arc::new(file)).unwrap();
        let expected =
            SamplingSettings { temperature: Some(0.25), top_k: Some(64), ..SamplingSettings::default() };
        assert_eq!(model.sampling(), &expected);
        assert!(model.facts().warnings[0].contains("general.sampling.penalty_repeat"));
    }
}
