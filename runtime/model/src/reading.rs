//! Decoders that read whole texts instead of continuing them: what a checkpoint says about that, the prompt
//! around a query and a document, and the head that gives their score.
//!
//! Such a model is recognised by the files of sentence-transformers beside it, by its class, or because the
//! caller asks for the task `rerank`. The only prompt that is known is the published one of Qwen3-Reranker.

pub(crate) mod file;

use crate::arch::bert::HeadOut;
use crate::arch::encoder_family::HeadActivation;
use crate::arch::{TensorProblem, TextHead};
use crate::checkpoint::{
    CONFIG, CheckpointFiles, CheckpointProblem, HeadConfig, Scoring, Sentence, TOKENIZER,
};
use crate::error::{LoadError, TokenizerProblem};
use crate::model::{self, ClassificationFacts, EmbeddingFacts, Model, TextPreparation};
use crate::score_head::ScoreHead;
use crate::tokenizer::{EncodedPair, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value};
use trustformers_plan::{Pooling, Weight, WeightError};
use trustformers_proto::Task;

/// The architecture whose prompt for ranking is known, by its name in GGUF files.
const RANKER: &str = "qwen3";
/// The end of the name of a class with one logit for a whole text.
const CLASSIFIER: &str = "ForSequenceClassification";

/// What stands before a query and a document.
pub(crate) const BEFORE: &str = "<|im_start|>system\nJudge whether the Document meets the requirements based \
     on the Query and the Instruct provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n\
     <|im_start|>user\n";
/// What stands after them.
pub(crate) const AFTER: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
/// The instruction where the checkpoint has no default prompt.
pub(crate) const INSTRUCTION: &str =
    "Given a web search query, retrieve relevant passages that answer the query";
/// A sentence by which a chat template is known to be the one that this module writes out.
const TASK_SENTENCE: &str =
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided";

/// The projection to the vocabulary, by its name in GGUF files.
const HEAD: &str = "output.weight";
/// The table of token embeddings, which is also the head where that is tied.
const EMBEDDING: &str = "token_embd.weight";

/// The answers whose logits are compared.
const YES: &str = "yes";
const NO: &str = "no";

/// What a decoder's checkpoint is for, where it is not for generating.
#[derive(Debug)]
pub(crate) enum Reading {
    /// It embeds.
    Embed(Sentence),
    /// It compares a query with documents.
    Rank(Ranking),
}

/// How a checkpoint ranks.
#[derive(Debug)]
pub(crate) struct Ranking {
    /// Where a text's logits come from.
    source: LogitSource,
    /// What the model is asked to find.
    instruction: String,
}

/// Where the logit of a pair comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum LogitSource {
    /// The logits of the words "yes" and "no" after the prompt; the folder of the module that says so, if one
    /// does.
    Words(Option<String>),
    /// A projection of its own.
    Projection,
}

/// The two ids of a module `LogitScore`.
#[derive(Deserialize)]
struct LogitScoreConfig {
    true_token_id: u32,
    false_token_id: Option<u32>,
}

impl Reading {
    /// What the files say; `None` of a model that generates.
    pub(crate) fn of(
        files: &CheckpointFiles,
        config: &Map<String, Value>,
    ) -> Result<Option<Self>, LoadError> {
        let class = config.get("architectures").and_then(|classes| classes[0].as_str()).unwrap_or_default();
        let modules = Sentence::modules(files)?;
        let scores = modules.iter().find(|module| module.name() == "LogitScore");
        let source = if class.ends_with(CLASSIFIER) {
            LogitSource::Projection
        } else if let Some(module) = scores {
            LogitSource::Words(Some(module.path.clone()))
        } else if !modules.is_empty() {
            check_class(files, config, class)?;
            return Sentence::of_decoder(files).map(|sentence| Some(Self::Embed(sentence)));
        } else if files.asked() == Some(Task::Rerank) {
            LogitSource::Words(None)
        } else {
            return Ok(None);
        };
        check_class(files, config, class)?;
        let prompt = Sentence::default_prompt(files)?;
        let instruction = if prompt.is_empty() { INSTRUCTION.to_owned() } else { prompt };
        Ok(Some(Self::Rank(Ranking { source, instruction })))
    }

    /// Makes a decoder that was loaded for generating one that reads texts. `projection` is the one to a
    /// single logit.
    pub(crate) fn apply(
        self,
        files: &CheckpointFiles,
        model: &mut Model,
        projection: Option<Weight>,
    ) -> Result<(), LoadError> {
        let (sentence, ranking) = match self {
            Self::Embed(sentence) => (sentence, None),
            Self::Rank(ranking) => {
                (Sentence { pooling: Pooling::Last, ..Sentence::of_classifier(files)? }, Some(ranking))
            }
        };
        let head = TextHead { pooling: sentence.pooling, normalise: sentence.normalised };
        model
            .architecture
            .read_texts(head)
            .map_err(|why| files.wrong(CONFIG, CheckpointProblem::key("model_type", why.to_owned())))?;
        let positions = model.facts.context_tokens;
        let max_tokens = sentence.max_tokens.map_or(positions, |tokens| tokens.min(positions));
        model.facts.context_tokens = max_tokens;
        if let Some(ranking) = ranking {
            ranking.apply(files, model, projection)?;
        } else {
            let (prompt, lowercase) = (sentence.prompt.clone(), sentence.lowercase);
            model.preparation = TextPreparation { prompt, lowercase, pair: None };
            model.facts.task = Task::Embed;
            let width = model.architecture.sizes().width;
            model.facts.embedding = Some(EmbeddingFacts {
                shortest: model::shortest(&model.facts.architecture, sentence.pooling, width),
                width,
                max_tokens,
                pooling: sentence.pooling,
                pooling_note: sentence.note,
                normalised: sentence.normalised,
                prompt: sentence.prompt,
            });
        }
        let special = model.special_tokens();
        if max_tokens > special {
            return Ok(());
        }
        let why = format!(
            "a text may have {max_tokens} tokens (this key, or max_seq_length of sentence_bert_config.json), but the \
             {special} tokens around it alone need them all"
        );
        Err(files.wrong(CONFIG, CheckpointProblem::Malformed { key: "max_position_embeddings", why }))
    }

    /// Whether the model has a projection to one logit.
    pub(crate) fn has_projection(&self) -> bool {
        matches!(self, Self::Rank(Ranking { source: LogitSource::Projection, .. }))
    }

    /// Whether the projection to the vocabulary is used.
    pub(crate) fn has_vocabulary_head(&self) -> bool {
        matches!(self, Self::Rank(Ranking { source: LogitSource::Words(_), .. }))
    }
}

/// Refuses a class that computes something else, and a model that a program beside it computes.
fn check_class(files: &CheckpointFiles, config: &Map<String, Value>, class: &str) -> Result<(), LoadError> {
    let ends = ["ForCausalLM", "Model", CLASSIFIER];
    if !class.is_empty() && !ends.iter().any(|end| class.ends_with(end)) {
        let supported = "a decoder, ForCausalLM, or ForSequenceClassification with one label";
        let problem = CheckpointProblem::unsupported("architectures", format!("{class:?}"), supported);
        return Err(files.wrong(CONFIG, problem));
    }
    if config.contains_key("auto_map") {
        let supported = "models that read texts without code of their own";
        return Err(files.wrong(CONFIG, CheckpointProblem::unsupported("auto_map", "set", supported)));
    }
    Ok(())
}

impl Ranking {
    fn apply(
        &self,
        files: &CheckpointFiles,
        model: &mut Model,
        projection: Option<Weight>,
    ) -> Result<(), LoadError> {
        self.check(files, &model.facts.architecture, model.facts.chat_template.as_deref())?;
        let head = self.head(files, model, projection)?;
        let Scoring { task, activation, labels } = self.scoring(files, head.labels())?;
        let pair = PairPrompt::new(self.instruction.clone(), &model.tokenizer);
        let pair = pair.map_err(|problem| LoadError::Tokenizer { path: files.path(TOKENIZER), problem })?;
        model.preparation = TextPreparation { pair: Some(pair), ..TextPreparation::default() };
        model.facts.task = task;
        let width = model.architecture.sizes().width;
        model.facts.classification = Some(ClassificationFacts { width, labels, activation, by_token: false });
        model.score_head = Some(head);
        Ok(())
    }

    /// Refuses an architecture or a chat template whose prompt is not the known one, and answers with other
    /// ids.
    fn check(
        &self,
        files: &CheckpointFiles,
        architecture: &str,
        template: Option<&str>,
    ) -> Result<(), LoadError> {
        let unsupported = CheckpointProblem::unsupported;
        if architecture != RANKER {
            let problem = unsupported("model_type", architecture, "qwen3, of models that rank");
            return Err(files.wrong(CONFIG, problem));
        }
        if matches!(self.source, LogitSource::Words(Some(_)))
            && !template.is_some_and(|template| template.contains(TASK_SENTENCE))
        {
            let found = "another prompt for ranking";
            let problem = unsupported("chat_template", found, "the published one of Qwen3-Reranker");
            return Err(files.wrong(CONFIG, problem));
        }
        Ok(())
    }

    /// The head that gives the logit of a pair: the difference of the logits of "yes" and "no", whose sigmoid
    /// is the share of "yes" in the softmax over both. `own` is the projection of a checkpoint that has one.
    fn head(
        &self,
        files: &CheckpointFiles,
        model: &Model,
        own: Option<Weight>,
    ) -> Result<ScoreHead, LoadError> {
        let width = model.architecture.sizes().width;
        let made = |problem: String| files.wrong(CONFIG, CheckpointProblem::Configuration(problem));
        let weight = match (&self.source, own) {
            (LogitSource::Projection, Some(own)) => own,
            (LogitSource::Projection, None) => {
                return Err(made("tensor score.weight is missing; download the model again".to_owned()));
            }
            (LogitSource::Words(module), _) => {
                let [yes, no] = answer_ids(files, &model.tokenizer, module.as_deref())?;
                // The embedding itself where no tensor is stored for the head.
                let vocabulary = model.weights.find(HEAD).or_else(|| model.weights.find(EMBEDDING));
                let vocabulary = vocabulary.ok_or_else(|| made(format!("tensor {EMBEDDING} is missing")))?;
                let vocabulary = model.weights.get(vocabulary);
                difference(vocabulary, [yes as usize, no as usize])
                    .map_err(|error| made(error.to_string()))?
            }
        };
        head_of(weight, width).map_err(|problem| files.wrong(CONFIG, problem))
    }

    /// What the one logit means.
    fn scoring(&self, files: &CheckpointFiles, labels: usize) -> Result<Scoring, LoadError> {
        let wrong = |problem| files.wrong(CONFIG, problem);
        let config: HeadConfig = files.json(CONFIG)?;
        // The configuration of a model that compares words has the labels of no head.
        let config = if self.source == LogitSource::Projection { config } else { HeadConfig::default() };
        let scoring = config.scoring(labels).map_err(wrong)?;
        if scoring.task != Task::Rerank {
            let found = format!("{labels} of a decoder");
            let supported = "a decoder's head with one logit that is no regression";
            return Err(wrong(CheckpointProblem::unsupported("id2label", found, supported)));
        }
        Ok(scoring)
    }
}

/// The projection that gives the difference of what two rows of a matrix give.
fn difference(matrix: &Weight, [yes, no]: [usize; 2]) -> Result<Weight, WeightError> {
    let (mut of_yes, mut of_no) = (vec![0.0; matrix.cols()], vec![0.0; matrix.cols()]);
    matrix.dequantise_row(yes, &mut of_yes);
    matrix.dequantise_row(no, &mut of_no);
    let difference: Vec<f32> = of_yes.iter().zip(&of_no).map(|(yes, no)| yes - no).collect();
    Weight::from_f32("yes - no", (1, matrix.cols()), &difference)
}

/// The head of a projection without a bias, of rows of this width.
fn head_of(weight: Weight, width: usize) -> Result<ScoreHead, TensorProblem> {
    let bias = Weight::from_f32("score.bias", (1, weight.rows()), &vec![0.0; weight.rows()]);
    let bias =
        bias.map_err(|error| TensorProblem { name: "score.bias".to_owned(), why: error.to_string() })?;
    ScoreHead::new(&HeadOut { weight, bias }, HeadActivation::None, width)
}

/// The ids of "yes" and "no", which must be those that a module names.
fn answer_ids(
    files: &CheckpointFiles,
    tokenizer: &Tokenizer,
    module: Option<&str>,
) -> Result<[u32; 2], LoadError> {
    let (Some(yes), Some(no)) = (tokenizer.id(YES), tokenizer.id(NO)) else {
        let why = "the tokens \"yes\" and \"no\" are needed to rank, and the vocabulary lacks one of them";
        let problem = CheckpointProblem::Configuration(why.to_owned());
        return Err(files.wrong(CONFIG, problem));
    };
    let Some(folder) = module else { return Ok([yes, no]) };
    let name = format!("{folder}/config.json");
    let Some(config) = files.optional_json::<LogitScoreConfig>(&name)? else {
        return Err(files.wrong(&name, CheckpointProblem::Missing));
    };
    if config.true_token_id != yes {
        let found = config.true_token_id.to_string();
        let problem = CheckpointProblem::unsupported("true_token_id", found, "the id of \"yes\"");
        return Err(files.wrong(&name, problem));
    }
    if config.false_token_id != Some(no) {
        let found = config.false_token_id.map_or("null".to_owned(), |id| id.to_string());
        let problem = CheckpointProblem::unsupported("false_token_id", found, "the id of \"no\"");
        return Err(files.wrong(&name, problem));
    }
    Ok([yes, no])
}

/// The prompt of a decoder that ranks.
#[derive(Debug)]
pub(crate) struct PairPrompt {
    instruction: String,
    /// The ids before the query.
    before: Vec<u32>,
    /// The ids after the document.
    after: Vec<u32>,
}

impl PairPrompt {
    /// The published prompt as ids of this tokenizer.
    fn new(instruction: String, tokenizer: &Tokenizer) -> Result<Self, TokenizerProblem> {
        let ids = |text: &str| tokenizer.encode_plain_up_to(text, usize::MAX).map(|encoded| encoded.ids);
        let (before, after) = (ids(BEFORE)?, ids(AFTER)?);
        Ok(Self { instruction, before, after })
    }

    /// Tokens of the prompt that are never cut.
    pub(crate) fn len(&self) -> usize {
        self.before.len() + self.after.len()
    }

    /// The ids of a query and a document, at most `most` with the prompt around them: a longer document loses
    /// its end.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        [query, document]: [&str; 2],
        most: usize,
    ) -> Result<EncodedPair, TokenizerProblem> {
        let text = format!("<Instruct>: {}\n<Query>: {query}\n<Document>: {document}", self.instruction);
        let body = tokenizer.encode_plain_up_to(&text, most.saturating_sub(self.len()))?;
        let ids = self.before.iter().chain(&body.ids).chain(&self.after).copied().collect();
        Ok(EncodedPair { ids, second_segment: None, cut: body.cut })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::{SeededReader, SeededReading};
    use serde_json::json;
    use std::ops::ControlFlow;
    use std::path::Path;

    /// Writes the checkpoint, lets `change` at its folder, and loads it.
    fn load(reading: SeededReading, task: Option<Task>, change: impl Fn(&Path)) -> Result<Model, String> {
        let folder = tempfile::tempdir().unwrap();
        SeededReader::new(reading).write(folder.path()).unwrap();
        change(folder.path());
        let files = CheckpointFiles::of_folder(folder.path()).unwrap().asked_for(task);
        Model::load_checkpoint_while(&files, &mut |_| ControlFlow::Continue(()))
            .map_err(|error| error.to_string())
    }

    fn set(folder: &Path, file: &str, key: &str, value: Value) {
        let path = folder.join(file);
        let mut content: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        content[key] = value;
        std::fs::write(path, content.to_string()).unwrap();
    }

    /// The modules of a model that ranks by its words, with these ids.
    fn write_logit_score(folder: &Path, yes: u32, no: &Value, template: &str) {
        let kinds = ["base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore"];
        let modules = json!([
            {"idx": 0, "name": "0", "path": "", "type": format!("sentence_transformers.{}", kinds[0])},
            {"idx": 1, "name": "1", "path": "1_LogitScore", "type": format!("sentence_transformers.{}", kinds[1])},
        ]);
        std::fs::write(folder.join("modules.json"), modules.to_string()).unwrap();
        std::fs::create_dir(folder.join("1_LogitScore")).unwrap();
        let config = json!({"true_token_id": yes, "false_token_id": no});
        std::fs::write(folder.join("1_LogitScore/config.json"), config.to_string()).unwrap();
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    }

    #[test]
    fn files_and_the_task_asked_for_decide_what_a_decoder_does() {
        let task = |reading, asked| load(reading, asked, |_| {}).unwrap().task();
        assert_eq!(task(SeededReading::Embed, None), Task::Embed);
        assert_eq!(task(SeededReading::Embed, Some(Task::Rerank)), Task::Embed, "its modules say so");
        assert_eq!(task(SeededReading::Words, None), Task::Generate);
        assert_eq!(task(SeededReading::Words, Some(Task::Rerank)), Task::Rerank);
        assert_eq!(task(SeededReading::Projection, None), Task::Rerank);
        let model = load(SeededReading::Words, None, |folder| {
            write_logit_score(folder, 260, &json!(261), TASK_SENTENCE);
        });
        let model = model.unwrap();
        assert_eq!((model.task(), model.facts().context_tokens), (Task::Rerank, 512));
        let prompt = model.special_tokens();
        let pair = model.encode_pair("a", "b", prompt + 10).unwrap();
        assert_eq!((pair.ids.len(), pair.cut, pair.second_segment), (prompt + 10, true, None));
    }

    #[test]
    fn the_default_prompt_is_the_instruction() {
        let with = |prompt: &str| {
            load(SeededReading::Projection, None, |folder| {
                let prompts = json!({"prompts": {"own": prompt}, "default_prompt_name": "own"});
                let path = folder.join("config_sentence_transformers.json");
                std::fs::write(path, prompts.to_string()).unwrap();
            })
        };
        let ids = |model: &Model| model.encode_pair("q", "d", 512).unwrap().ids;
        let (own, known) = (with("find it").unwrap(), with(INSTRUCTION).unwrap());
        let plain = load(SeededReading::Projection, None, |_| {}).unwrap();
        assert_eq!(ids(&known), ids(&plain));
        assert!(ids(&own).len() < ids(&plain).len());
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let config = |key: &'static str, value: Value| {
            move |folder: &Path| set(folder, "config.json", key, value.clone())
        };
        let error = |reading, change: &dyn Fn(&Path)| load(reading, None, change).unwrap_err();
        let found = error(SeededReading::Embed, &config("auto_map", json!({"AutoModel": "own.Model"})));
        assert!(found.contains("key auto_map is set, which is not supported"), "{found}");
        let class = json!(["Qwen3ForTokenClassification"]);
        let found = error(SeededReading::Embed, &config("architectures", class));
        assert!(found.contains("key architectures is \"Qwen3ForTokenClassification\""), "{found}");
        let found = error(SeededReading::Embed, &config("max_position_embeddings", 1.into()));
        assert!(found.contains("a text may have 1 tokens"), "{found}");
        let found = error(SeededReading::Embed, &|folder| {
            let modules = std::fs::read_to_string(folder.join("modules.json")).unwrap();
            std::fs::write(folder.join("modules.json"), modules.replace("Normalize", "Dense")).unwrap();
        });
        assert!(found.contains("key type is Dense at place 2"), "{found}");
        let two = config("id2label", json!({"0": "a", "1": "b"}));
        let found = error(SeededReading::Projection, &two);
        assert!(found.contains("key id2label: 2 labels for a head with 1 logits"), "{found}");
        let ids =
            [(9, json!(261), "key true_token_id is 9"), (260, Value::Null, "key false_token_id is null")];
        for (yes, no, wanted) in ids {
            let found =
                error(SeededReading::Words, &|folder| write_logit_score(folder, yes, &no, TASK_SENTENCE));
            assert!(found.contains(wanted), "{found}");
        }
        let found = error(SeededReading::Words, &|folder| {
            write_logit_score(folder, 260, &json!(261), "{{ messages }}");
        });
        assert!(found.contains("key chat_template is another prompt for ranking"), "{found}");
    }
}
