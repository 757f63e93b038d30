//! A decoder that ranks in a GGUF file, as converters write Qwen3-Reranker: of the projection to the
//! vocabulary only the rows of "yes" and "no", and the prompt as a template.

use super::{AFTER, BEFORE, NO, PairPrompt, RANKER, YES, difference, head_of};
use crate::arch::TensorProblem;
use crate::error::LoadError;
use crate::gguf::{Gguf, GgufProblem};
use crate::model::{ClassificationFacts, Model, TextPreparation};
use crate::score_head::ScoreActivation;
use std::path::Path;
use trustformers_plan::{Weight, Weights};
use trustformers_proto::Task;

/// The number of llama.cpp, under `<architecture>.pooling_type`, for files that rank.
const RANK: u64 = 4;
/// The two rows: the one of "yes", then the one of "no".
const HEAD: &str = "cls.output.weight";
/// Their names.
const LABELS: &str = "classifier.output_labels";
/// The prompt with `{query}` and `{document}` in it.
const TEMPLATE: &str = "tokenizer.chat_template.rerank";

/// How a file ranks.
#[derive(Debug)]
pub(crate) struct FileRanking {
    /// Gives the difference of the logits of "yes" and "no".
    projection: Weight,
    /// What the model is asked to find.
    instruction: String,
}

impl FileRanking {
    /// What a file of the architecture `name` says; `None` of one that does not rank. The head is taken out
    /// of `weights`: the host computes with it.
    pub(crate) fn take(
        name: &str,
        gguf: &Gguf,
        bytes: &[u8],
        weights: &mut Weights,
    ) -> Result<Option<Self>, GgufProblem> {
        let (meta, pooling) = (&gguf.metadata, format!("{name}.pooling_type"));
        if meta.opt_unsigned(&pooling)? != Some(RANK) {
            return Ok(None);
        }
        if name != RANKER {
            let why = format!(
                "{RANK} is not supported; 0 (none), 1 (mean), 2 (first) and 3 (last) are, and {RANK} (rank) of \
                 {RANKER} and bert"
            );
            return Err(GgufProblem::BadValue { key: pooling, why });
        }
        let key = format!("{name}.{LABELS}");
        let labels: Option<Vec<&str>> = meta.array(&key, bytes)?.strings().map(Iterator::collect);
        if labels != Some(vec![YES, NO]) {
            let why = format!("only the labels {YES:?} and {NO:?}, in this order, are supported");
            return Err(GgufProblem::BadValue { key, why });
        }
        let instruction = instruction(meta.string(TEMPLATE)?).ok_or_else(|| GgufProblem::BadValue {
            key: TEMPLATE.to_owned(),
            why: "another prompt for ranking is not supported; only the published one of Qwen3-Reranker is"
                .to_owned(),
        })?;
        let projection = take_projection(weights)?;
        Ok(Some(Self { projection, instruction: instruction.to_owned() }))
    }

    /// Makes a decoder that reads texts one that ranks; `path` is for messages.
    pub(crate) fn apply(self, path: &Path, model: &mut Model) -> Result<(), LoadError> {
        let Self { projection, instruction } = self;
        let width = model.architecture.sizes().width;
        let head = head_of(projection, width)
            .map_err(|problem| LoadError::gguf(path, GgufProblem::from(problem)))?;
        let pair = PairPrompt::new(instruction, &model.tokenizer)
            .map_err(|problem| LoadError::Tokenizer { path: path.to_owned(), problem })?;
        let (needed, most) = (pair.len() + 1, model.facts.context_tokens);
        if needed > most {
            let why = format!("{needed} are needed for the prompt, and the file has room for {most}");
            let key = format!("{RANKER}.context_length");
            return Err(LoadError::gguf(path, GgufProblem::BadValue { key, why }));
        }
        model.preparation = TextPreparation { pair: Some(pair), ..TextPreparation::default() };
        model.facts.task = Task::Rerank;
        model.facts.embedding = None;
        let (labels, activation) = (vec!["LABEL_0".to_owned()], ScoreActivation::Sigmoid);
        model.facts.classification = Some(ClassificationFacts { width, labels, activation, by_token: false });
        model.score_head = Some(head);
        Ok(())
    }
}

/// The instruction in a template that is the published one otherwise.
fn instruction(template: &str) -> Option<&str> {
    let rest = template.strip_prefix(BEFORE)?.strip_prefix("<Instruct>: ")?.strip_suffix(AFTER)?;
    let own = rest.strip_suffix("\n<Query>: {query}\n<Document>: {document}")?;
    (!own.contains(['{', '}'])).then_some(own)
}

/// The head as one row, which is no weight of a plan.
fn take_projection(weights: &mut Weights) -> Result<Weight, GgufProblem> {
    let wrong = |why: String| GgufProblem::from(TensorProblem { name: HEAD.to_owned(), why });
    let Some(head) = weights.find(HEAD).map(|id| weights.get(id).clone()) else {
        let why = "it is missing; convert the model again with a current converter";
        return Err(wrong(why.to_owned()));
    };
    if head.rows() != 2 {
        let why = format!("it has {} rows; one of {YES:?} and one of {NO:?} were expected", head.rows());
        return Err(wrong(why));
    }
    let mut others = Weights::new();
    for (_, weight) in weights.iter().filter(|(_, weight)| weight.name() != HEAD) {
        others.push(weight.clone()).map_err(|problem| wrong(problem.to_string()))?;
    }
    *weights = others;
    difference(&head, [0, 1]).map_err(|problem| wrong(problem.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CheckpointFiles;
    use crate::gguf::GgufValue;
    use crate::seeded::{SeededFamily, SeededModel, SeededReader, SeededReading};
    use std::ops::ControlFlow;
    use std::sync::Arc;

    fn of_file(keys: &[(&str, GgufValue)]) -> Result<Model, String> {
        let file = SeededReader::new(SeededReading::Words).ranking_gguf(keys);
        Model::from_bytes(Path::new("reranker.gguf"), Arc::new(file)).map_err(|error| error.to_string())
    }

    fn of_folder() -> Model {
        let folder = tempfile::tempdir().unwrap();
        SeededReader::new(SeededReading::Words).write(folder.path()).unwrap();
        let files = CheckpointFiles::of_folder(folder.path()).unwrap().asked_for(Some(Task::Rerank));
        Model::load_checkpoint_while(&files, &mut |_| ControlFlow::Continue(())).unwrap()
    }

    #[test]
    fn a_file_ranks_with_the_prompt_and_the_head_of_its_folder() {
        let (file, folder) = (of_file(&[]).unwrap(), of_folder());
        assert_eq!((file.task(), file.facts().embedding.as_ref()), (Task::Rerank, None));
        assert_eq!(file.facts().classification, folder.facts().classification);
        let ids = |model: &Model| model.encode_pair("the cat", "hello", 512).unwrap().ids;
        let control = |ids: &[u32]| ids.iter().copied().filter(|id| *id < 3).collect::<Vec<u32>>();
        let (own, wanted) = (ids(&file), ids(&folder));
        assert_eq!(file.tokenizer().decode(&own), folder.tokenizer().decode(&wanted));
        assert_eq!(control(&own), control(&wanted));
        let row: Vec<f32> =
            (0..file.facts().classification.as_ref().unwrap().width).map(|i| i as f32).collect();
        assert_eq!(file.logits(&row), folder.logits(&row));
        assert!(file.weights().find(HEAD).is_none(), "the host has it");
        let own = "<Instruct>: find it\n<Query>: {query}\n<Document>: {document}";
        let own = GgufValue::String(format!("{BEFORE}{own}{AFTER}"));
        let short = of_file(&[(TEMPLATE, own)]).unwrap();
        assert!(ids(&short).len() < ids(&file).len(), "the file's instruction is used");
    }

    #[test]
    fn what_is_not_computed_is_refused_by_its_key() {
        let text = |text: &str| GgufValue::String(text.to_owned());
        let labels = |labels: &[&str]| GgufValue::Strings(labels.iter().map(|l| (*l).to_owned()).collect());
        let cases = [
            (TEMPLATE, text("{query} {document}"), "key tokenizer.chat_template.rerank: another prompt"),
            ("qwen3.classifier.output_labels", labels(&["no", "yes"]), "only the labels \"yes\" and \"no\""),
            ("qwen3.classifier.output_labels", labels(&["a"]), "only the labels \"yes\" and \"no\""),
            ("qwen3.pooling_type", GgufValue::U32(3), "key qwen3.classifier.output_labels is not part of"),
            ("qwen3.context_length", GgufValue::U32(64), "key qwen3.context_length: "),
        ];
        for (key, value, wanted) in cases {
            let error = of_file(&[(key, value)]).unwrap_err();
            assert!(error.contains(wanted), "{key}: {error}");
        }
        let model = SeededModel { family: SeededFamily::Qwen3, ..SeededModel::default() };
        let bare = |keys: &[(&str, GgufValue)]| {
            let file = Arc::new(model.gguf_with(keys));
            Model::from_bytes(Path::new("m.gguf"), file).unwrap_err().to_string()
        };
        let rank = ("qwen3.pooling_type", GgufValue::U32(4));
        let error = bare(std::slice::from_ref(&rank));
        assert!(error.contains("key qwen3.classifier.output_labels is missing"), "{error}");
        let named = ("qwen3.classifier.output_labels", labels(&[YES, NO]));
        let error = bare(&[rank.clone(), named.clone()]);
        assert!(error.contains("key tokenizer.chat_template.rerank is missing"), "{error}");
        let template = "<Instruct>: find it\n<Query>: {query}\n<Document>: {document}";
        let template = (TEMPLATE, text(&format!("{BEFORE}{template}{AFTER}")));
        let error = bare(&[rank, named, template]);
        assert!(error.contains("tensor cls.output.weight: it is missing"), "{error}");
    }
}
