//! The keys of `config.json` about a head that gives logits: its labels, and how logits become scores.
//! The last two keys are those that sentence-transformers writes for cross-encoders.

use super::CheckpointProblem;
use crate::score_head::ScoreActivation;
use serde::Deserialize;
use std::collections::BTreeMap;
use trustformers_proto::Task;

/// Most labels whose names are read: several times those of the largest known classifiers.
const MAX_LABELS: usize = 1 << 16;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct HeadConfig {
    id2label: BTreeMap<String, String>,
    problem_type: Option<String>,
    sentence_transformers: CrossEncoderConfig,
    sbert_ce_default_activation_function: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct CrossEncoderConfig {
    activation_fn: Option<String>,
}

/// What the logits of a checkpoint mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scoring {
    /// Classify or rerank.
    pub(crate) task: Task,
    pub(crate) activation: ScoreActivation,
    /// The name of each logit.
    pub(crate) labels: Vec<String>,
}

impl HeadConfig {
    /// What `count` logits mean. One logit is how well two texts fit each other, unless the file says
    /// that it is a number of another kind.
    pub(crate) fn scoring(&self, count: usize) -> Result<Scoring, CheckpointProblem> {
        let labels = self.labels(count)?;
        let problem = self.problem_type.as_deref();
        if count == 1 && problem != Some("regression") {
            return Ok(Scoring { task: Task::Rerank, activation: self.cross_encoder()?, labels });
        }
        let activation = match problem {
            None | Some("single_label_classification") => ScoreActivation::Softmax,
            Some("multi_label_classification") => ScoreActivation::Sigmoid,
            Some("regression") => ScoreActivation::Identity,
            Some(other) => {
                let supported = "single_label_classification, multi_label_classification, regression";
                return Err(CheckpointProblem::unsupported("problem_type", format!("{other:?}"), supported));
            }
        };
        Ok(Scoring { task: Task::Classify, activation, labels })
    }

    /// What `count` logits of a token mean: its labels exclude each other.
    pub(crate) fn scoring_of_tokens(&self, count: usize) -> Result<Scoring, CheckpointProblem> {
        let labels = self.labels(count)?;
        Ok(Scoring { task: Task::Classify, activation: ScoreActivation::Softmax, labels })
    }

    /// The activation of a cross-encoder: what its file says, and else the sigmoid, as in the library.
    fn cross_encoder(&self) -> Result<ScoreActivation, CheckpointProblem> {
        let named = self.sentence_transformers.activation_fn.as_ref();
        let Some(path) = named.or(self.sbert_ce_default_activation_function.as_ref()) else {
            return Ok(ScoreActivation::Sigmoid);
        };
        // The path of a class of PyTorch, such as torch.nn.modules.linear.Identity.
        match path.rsplit('.').next() {
            Some("Sigmoid") => Ok(ScoreActivation::Sigmoid),
            Some("Identity") => Ok(ScoreActivation::Identity),
            _ => {
                Err(CheckpointProblem::unsupported("activation_fn", format!("{path:?}"), "Sigmoid, Identity"))
            }
        }
    }

    /// The names in the order of the logits; `LABEL_0` and so on where the file has none.
    fn labels(&self, count: usize) -> Result<Vec<String>, CheckpointProblem> {
        let wrong = |why: String| CheckpointProblem::Malformed { key: "id2label", why };
        if count > MAX_LABELS {
            return Err(wrong(format!("the head has {count} logits; at most {MAX_LABELS} are served")));
        }
        if self.id2label.is_empty() {
            return Ok((0..count).map(|id| format!("LABEL_{id}")).collect());
        }
        if self.id2label.len() != count {
            return Err(wrong(format!("{} labels for a head with {count} logits", self.id2label.len())));
        }
        let name = |id: usize| {
            let label = self.id2label.get(&id.to_string()).cloned();
            label.ok_or_else(|| wrong(format!("no label for logit {id} of {count}")))
        };
        (0..count).map(name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn scoring(config: Value, count: usize) -> Result<Scoring, String> {
        let config: HeadConfig = serde_json::from_value(config).unwrap();
        config.scoring(count).map_err(|problem| problem.to_string())
    }

    #[test]
    fn the_files_keys_decide_task_and_activation() {
        let spam =
            json!({"id2label": {"1": "SPAM", "0": "HAM"}, "problem_type": "single_label_classification"});
        let spam = scoring(spam, 2).unwrap();
        assert_eq!(
            (spam.task, spam.activation, spam.labels),
            (Task::Classify, ScoreActivation::Softmax, vec!["HAM".to_owned(), "SPAM".to_owned()],)
        );
        let of = |config: Value, count: usize| {
            let scoring = scoring(config, count).unwrap();
            (scoring.task, scoring.activation)
        };
        let multi = json!({"problem_type": "multi_label_classification"});
        assert_eq!(of(multi, 3), (Task::Classify, ScoreActivation::Sigmoid));
        assert_eq!(of(json!({"problem_type": "regression"}), 1), (Task::Classify, ScoreActivation::Identity));
        assert_eq!(of(json!({}), 3), (Task::Classify, ScoreActivation::Softmax));
        assert_eq!(of(json!({}), 1), (Task::Rerank, ScoreActivation::Sigmoid));
        let identity =
            json!({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}});
        assert_eq!(of(identity, 1), (Task::Rerank, ScoreActivation::Identity));
        let old = json!({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"});
        assert_eq!(of(old, 1), (Task::Rerank, ScoreActivation::Identity));
        assert_eq!(scoring(json!({}), 2).unwrap().labels, ["LABEL_0", "LABEL_1"]);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_its_key() {
        let cases = [
            (json!({"problem_type": "ranking"}), 2, "key problem_type is \"ranking\""),
            (json!({"id2label": {"0": "a"}}), 2, "key id2label: 1 labels for a head with 2 logits"),
            (json!({"id2label": {"0": "a", "2": "b"}}), 2, "key id2label: no label for logit 1 of 2"),
            (
                json!({"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}),
                1,
                "key activation_fn is \"torch.nn.Tanh\"",
            ),
        ];
        for (config, count, wanted) in cases {
            let error = scoring(config, count).unwrap_err();
            assert!(error.starts_with(wanted), "{error}");
        }
    }
}
