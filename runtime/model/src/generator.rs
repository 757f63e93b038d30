//! Loading a checkpoint that generates text: its configuration, weights in one file or several, and tokenizer
//! become a [`Model`].

use crate::arch;
use crate::chat::{self, ChatError, ChatTemplate};
use crate::checkpoint::decoder::ids_of;
use crate::checkpoint::quantised::{self, Quantisation};
use crate::checkpoint::tensor_names::{TensorName, tensor_name};
use crate::checkpoint::{CONFIG, CheckpointFiles, CheckpointProblem, DecoderConfig, Shard, TOKENIZER};
use crate::error::{LoadError, TokenizerProblem};
use crate::model::{Model, ModelFacts, TextPreparation};
use crate::reading::Reading;
use crate::sampling::SamplingSettings;
use crate::source::OnRead;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;
use trustformers_plan::{Weight, Weights};
use trustformers_proto::Task;

/// Settings of generation: the ids that end an answer, and how to sample.
const GENERATION: &str = "generation_config.json";

/// The vocabulary head; not stored, or not used, where it is the embedding.
const HEAD: &str = "output.weight";

/// The projection to one logit.
const SCORE: &str = "cls.output.weight";

/// Keys about the class of a model without a vocabulary head, which were checked before the others.
const CHECKED_KEYS: [&str; 3] =
    ["architectures", "sentence_transformers", "sbert_ce_default_activation_function"];

/// What an answer's end is read from.
const END: &str = "eos_token_id";

/// The warning about a checkpoint without an end token.
const NO_END_TOKEN: &str = "config.json and generation_config.json name no end token (key eos_token_id): answers end \
     only at max_tokens, the context or a stop text";

/// Reads and checks the checkpoint of a decoder, whose `model_type` is one of
/// [`crate::checkpoint::decoder::model_types`].
pub(crate) fn load(
    files: &CheckpointFiles,
    model_type: &str,
    progress: &mut OnRead<'_>,
) -> Result<Model, LoadError> {
    let mut content: Map<String, Value> = files.json(CONFIG)?;
    let reading = Reading::of(files, &content)?;
    let vocabulary_head = reading.as_ref().is_none_or(Reading::has_vocabulary_head);
    if !vocabulary_head {
        CHECKED_KEYS.iter().for_each(|key| drop(content.remove(*key)));
    }
    let quantisation = Quantisation::take(&mut content).map_err(|problem| files.wrong(CONFIG, problem))?;
    let mut config =
        DecoderConfig::read(model_type, &content).map_err(|problem| files.wrong(CONFIG, problem))?;
    config.is_tied |= !vocabulary_head;
    config.has_score = reading.as_ref().is_some_and(Reading::has_projection);
    let tokenizer_file = files.bytes(TOKENIZER)?;
    files.refuse_foreign(TOKENIZER, &tokenizer_file)?;
    let generation: Map<String, Value> = files.optional_json(GENERATION)?.unwrap_or_default();
    let ends = ends(files, &generation, &config)?;
    let tokenizer = match &reading {
        None => Tokenizer::of_generator(&tokenizer_file, ends),
        Some(_) => Tokenizer::of_reader(&tokenizer_file),
    };
    let tokenizer = tokenizer
        .and_then(|tokenizer| check_vocabulary(tokenizer, &config))
        .map_err(|problem| LoadError::Tokenizer { path: files.path(TOKENIZER), problem })?;
    let mut shards = files.shards(progress)?;
    let file_bytes = shards.iter().map(|shard| shard.stored.file_bytes() as u64).sum();
    if let Some(quantisation) = quantisation {
        quantised::unpack(&quantisation, &mut shards)
            .map_err(|refused| files.wrong(&refused.file, refused.problem))?;
    }
    let names = Names::of(&shards, config.norms_after);
    let mut weights = weights(files, &shards, &config, tokenizer.len())?;
    let parameters = weights.iter().map(|(_, weight)| weight.rows() as u64 * weight.cols() as u64).sum();
    let architecture =
        arch::resolve_checkpoint(config.architecture, &config.metadata, &config.keys, &mut weights).map_err(
            |problem| {
                let message = names.with_own_names(&config.with_own_keys(&problem.to_string()));
                files.wrong(CONFIG, CheckpointProblem::Configuration(message))
            },
        )?;
    let (chat_template, chat) = chat_of(files)?;
    let sizes = architecture.sizes();
    let endless = reading.is_none() && tokenizer.eos_ids().is_empty();
    let mut facts = ModelFacts {
        task: Task::Generate,
        architecture: config.architecture.to_owned(),
        name: None,
        parameters,
        context_tokens: sizes.context_tokens,
        vocabulary: sizes.vocabulary,
        layers: sizes.layers,
        kv_heads: sizes.kv_heads,
        head_dim: sizes.head_dim,
        file_bytes,
        embedding: None,
        classification: None,
        chat_template,
        warnings: if endless { vec![NO_END_TOKEN.to_owned()] } else { Vec::new() },
    };
    let sampling = SamplingSettings::of_config(&generation, &mut facts.warnings);
    let preparation = TextPreparation::default();
    let weights = Arc::new(weights);
    let mut model =
        Model { weights, tokenizer, facts, architecture, chat, preparation, sampling, score_head: None };
    if let Some(reading) = reading {
        let projection = if config.has_score { score(files, &shards)? } else { None };
        reading.apply(files, &mut model, projection)?;
    }
    model.check_plan().map_err(|problem| LoadError::Plan { path: files.path(CONFIG), problem })?;
    Ok(model)
}

/// The chat template, as text and as what renders conversations.
fn chat_of(files: &CheckpointFiles) -> Result<(Option<String>, Result<ChatTemplate, ChatError>), LoadError> {
    let (template, special) = chat::config::of_checkpoint(files)?;
    let tools = chat::config::tools_of_checkpoint(files)?;
    let chat = match &template {
        Some(template) => ChatTemplate::new(template, special).map(|chat| match &tools {
            Some(tools) => chat.with_tools(tools),
            None => chat,
        }),
        None => Err(ChatError::NoTemplate),
    };
    Ok((template, chat))
}

/// The projection to one logit, where it is stored.
fn score(files: &CheckpointFiles, shards: &[Shard]) -> Result<Option<Weight>, LoadError> {
    let tensors = shards.iter().flat_map(|shard| shard.stored.tensors.iter().map(move |one| (shard, one)));
    let mut own = tensors.filter(|(_, (name, _))| {
        tensor_name(name, false).is_some_and(|name| name == TensorName::Weight(SCORE.to_owned()))
    });
    let Some((shard, (name, tensor))) = own.next() else { return Ok(None) };
    let wrong = |why: String| {
        let problem = arch::TensorProblem { name: name.clone(), why };
        files.wrong(&shard.name, CheckpointProblem::Tensor(problem))
    };
    let Some(dtype) = tensor.dtype else {
        return Err(wrong(format!("it is stored as {}; F32, F16 and BF16 are supported", tensor.stored_as)));
    };
    let source = Arc::clone(&shard.stored.source);
    let weight = Weight::new(SCORE.to_owned(), dtype, tensor.matrix, source, tensor.range.clone());
    weight.map(Some).map_err(|problem| wrong(problem.to_string()))
}

/// The ids that end an answer: those of the generation settings, otherwise those of the configuration.
fn ends(
    files: &CheckpointFiles,
    generation: &Map<String, Value>,
    config: &DecoderConfig,
) -> Result<Vec<u32>, LoadError> {
    match generation.get(END) {
        Some(value) => ids_of(END, value).map_err(|problem| files.wrong(GENERATION, problem)),
        None => Ok(config.ends.clone()),
    }
}

/// More rows than tokens are fine; a token without a row is not.
fn check_vocabulary(tokenizer: Tokenizer, config: &DecoderConfig) -> Result<Tokenizer, TokenizerProblem> {
    if tokenizer.len() <= config.vocabulary {
        return Ok(tokenizer);
    }
    let why = format!("ids up to {} for vocab_size {} of config.json", tokenizer.len(), config.vocabulary);
    Err(TokenizerProblem::Entry { key: "model.vocab", why })
}

/// The tensors under their names in GGUF files. Those with a row per token lose the rows without a token: no
/// prompt can contain such a row's id, and no answer may.
fn weights(
    files: &CheckpointFiles,
    shards: &[Shard],
    config: &DecoderConfig,
    tokens: usize,
) -> Result<Weights, LoadError> {
    let mut weights = Weights::new();
    let mut routed: BTreeMap<String, BTreeMap<usize, Weight>> = BTreeMap::new();
    for Shard { name: file, stored } in shards {
        for (name, tensor) in &stored.tensors {
            let wrong = |why: String| {
                files.wrong(file, CheckpointProblem::Tensor(arch::TensorProblem { name: name.clone(), why }))
            };
            let mut expert = None;
            let own = match tensor_name(name, config.norms_after) {
                Some(TensorName::Weight(own)) => own,
                Some(TensorName::Expert { all, index }) => {
                    expert = Some(index);
                    all
                }
                Some(TensorName::Buffer) => continue,
                None => return Err(wrong("it is not part of the architecture as supported here".to_owned())),
            };
            if own == HEAD && config.is_tied || own == SCORE && config.has_score {
                continue;
            }
            let Some(dtype) = tensor.dtype else {
                let supported = "F32, F16 and BF16 are supported, and types that quantization_config of \
                     config.json describes";
                return Err(wrong(format!("it is stored as {}; {supported}", tensor.stored_as)));
            };
            let (mut matrix, mut range) = (tensor.matrix, tensor.range.clone());
            if arch::has_row_per_token(&own) {
                if matrix.0 != config.vocabulary {
                    let (rows, asked) = (matrix.0, config.vocabulary);
                    return Err(wrong(format!("it has {rows} rows, vocab_size of config.json is {asked}")));
                }
                range.end = range.start + range.len() / matrix.0 * tokens;
                matrix.0 = tokens;
            }
            let source = Arc::clone(&stored.source);
            let weight = Weight::new(own.clone(), dtype, matrix, source, range)
                .map_err(|problem| wrong(problem.to_string()))?;
            match expert {
                Some(index) => {
                    routed.entry(own).or_default().insert(index, weight);
                }
                None => {
                    weights.push(weight).map_err(|problem| wrong(problem.to_string()))?;
                }
            }
        }
    }
    for (name, experts) in routed {
        push_stacked(&mut weights, &name, &experts).map_err(|problem| files.wrong(CONFIG, problem))?;
    }
    if !config.is_tied && weights.find(HEAD).is_none() {
        let why = "false, but the checkpoint has no lm_head.weight; download all of its files".to_owned();
        return Err(files.wrong(CONFIG, CheckpointProblem::key("tie_word_embeddings", why)));
    }
    Ok(weights)
}

/// Adds the matrices of all experts as one weight.
fn push_stacked(
    weights: &mut Weights,
    name: &str,
    experts: &BTreeMap<usize, Weight>,
) -> Result<(), CheckpointProblem> {
    let wrong = |why: String| {
        CheckpointProblem::Tensor(arch::TensorProblem { name: format!("{name} of the experts"), why })
    };
    if let Some(lacking) = (0..experts.len()).find(|index| !experts.contains_key(index)) {
        return Err(wrong(format!("expert {lacking} is missing; download all files of the checkpoint")));
    }
    let parts: Vec<&Weight> = experts.values().collect();
    let stacked = Weight::stacked(name, &parts).and_then(|stacked| weights.push(stacked));
    stacked.map(|_| ()).map_err(|problem| wrong(problem.to_string()))
}

/// The names of a checkpoint's tensors by those of GGUF files.
struct Names(BTreeMap<String, String>);

impl Names {
    fn of(shards: &[Shard], norms_after: bool) -> Self {
        let names = shards.iter().flat_map(|shard| shard.stored.tensors.keys());
        let own = names.filter_map(|name| match tensor_name(name, norms_after)? {
            TensorName::Weight(own) => Some((own, name.clone())),
            TensorName::Expert { .. } | TensorName::Buffer => None,
        });
        Self(own.collect())
    }

    /// A message with the checkpoint's names of tensors.
    fn with_own_names(&self, message: &str) -> String {
        let own = |word: &str| {
            let bare = word.trim_end_matches([':', ',', ';']);
            self.0.get(bare).map(|name| word.replace(bare, name))
        };
        let words = message.split(' ').map(|word| own(word).unwrap_or_else(|| word.to_owned()));
        words.collect::<Vec<_>>().join(" ")
    }
}
