//! Loading a checkpoint that embeds, classifies or ranks texts: its files, checked against each other,
//! become a [`Model`].

use crate::arch::bert::{self, EncoderShape, Head};
use crate::arch::encoder_family::{self, EncoderFamily};
use crate::chat::{self, ChatError, ChatTemplate};
use crate::checkpoint::decoder::model_types;
use crate::checkpoint::{
    BertConfig, CONFIG, CheckpointFiles, CheckpointProblem, HeadConfig, Scoring, Sentence, TOKENIZER, WEIGHTS,
};
use crate::error::{LoadError, TokenizerProblem};
use crate::model::{ClassificationFacts, EmbeddingFacts, Model, ModelFacts, TextPreparation};
use crate::sampling::SamplingSettings;
use crate::score_head::ScoreHead;
use crate::source::OnRead;
use crate::tokenizer::Tokenizer;
use serde::Deserialize;
use std::sync::Arc;
use trustformers_plan::Weights;
use trustformers_proto::Task;

/// The key of `config.json` that names the architecture.
#[derive(Deserialize)]
struct ModelType {
    model_type: String,
}

/// Reads and checks the checkpoint.
pub(crate) fn load(files: &CheckpointFiles, progress: &mut OnRead<'_>) -> Result<Model, LoadError> {
    let family = family(files)?;
    let config: BertConfig = files.json(CONFIG)?;
    config.check(family).map_err(|problem| files.wrong(CONFIG, problem))?;
    let scores = config.is_classifier();
    let sentence = if scores { Sentence::of_classifier(files)? } else { Sentence::read(files)? };
    let tokenizer_file = files.bytes(TOKENIZER)?;
    files.refuse_foreign(TOKENIZER, &tokenizer_file)?;
    let tokenizer = Tokenizer::from_json(&tokenizer_file)
        .and_then(|tokenizer| check_vocabulary(tokenizer, &config))
        .map_err(|problem| LoadError::Tokenizer { path: files.path(TOKENIZER), problem })?;
    let max_tokens = max_tokens(config.positions(family), &sentence, &tokenizer)
        .map_err(|problem| files.wrong(CONFIG, problem))?;
    let head = Head { pooling: sentence.pooling, normalise: sentence.normalised, scores, max_tokens };
    let shape = EncoderShape { family, config: &config, head };
    let stored = files.tensors(progress)?;
    let tensors = shape.tensors(&stored).map_err(|problem| files.wrong(WEIGHTS, problem))?;
    let mut weights = tensors.weights;
    let architecture =
        bert::resolve(&shape, &mut weights).map_err(|problem| files.wrong(WEIGHTS, problem))?;
    let score_head = match &tensors.head_out {
        Some(out) => Some(
            ScoreHead::new(out, family.head_activation, config.hidden_size)
                .map_err(|problem| files.wrong(WEIGHTS, problem))?,
        ),
        None => None,
    };
    let scoring = score_head.as_ref().map(|head| scoring(files, head.labels())).transpose()?;
    let mut facts = facts(&shape, &sentence, scoring, &weights);
    facts.file_bytes = stored.file_bytes() as u64;
    let (template, special) = chat::config::of_checkpoint(files)?;
    let chat = match &template {
        Some(template) => ChatTemplate::new(template, special),
        None => Err(ChatError::NoTemplate),
    };
    facts.chat_template = template;
    let preparation = TextPreparation { prompt: sentence.prompt, lowercase: sentence.lowercase };
    let weights = Arc::new(weights);
    let sampling = SamplingSettings::default();
    let model = Model { weights, tokenizer, facts, architecture, chat, preparation, sampling, score_head };
    model.check_plan().map_err(|problem| LoadError::Plan { path: files.path(CONFIG), problem })?;
    Ok(model)
}

fn family(files: &CheckpointFiles) -> Result<&'static EncoderFamily, LoadError> {
    let ModelType { model_type } = files.json(CONFIG)?;
    encoder_family::of_model_type(&model_type).ok_or_else(|| {
        let families = encoder_family::supported();
        let supported = format!("{families}, {} in a folder; others as a .gguf file", model_types());
        LoadError::Architecture { path: files.path(CONFIG), found: model_type, supported }
    })
}

/// What the logits of a classifier mean.
fn scoring(files: &CheckpointFiles, labels: usize) -> Result<Scoring, LoadError> {
    let config: HeadConfig = files.json(CONFIG)?;
    config.scoring(labels).map_err(|problem| files.wrong(CONFIG, problem))
}

/// Texts are as long as the checkpoint says, and never longer than its table of positions.
fn max_tokens(
    positions: usize,
    sentence: &Sentence,
    tokenizer: &Tokenizer,
) -> Result<usize, CheckpointProblem> {
    let max_tokens = sentence.max_tokens.map_or(positions, |tokens| tokens.min(positions));
    let special = tokenizer.special_tokens();
    if max_tokens <= special {
        let why = format!(
            "a text may have {max_tokens} tokens (this key, or max_seq_length of sentence_bert_config.json), but the \
             {special} special tokens alone need them all"
        );
        return Err(CheckpointProblem::Malformed { key: "max_position_embeddings", why });
    }
    Ok(max_tokens)
}

/// More rows than tokens are fine; a token without a row is not.
fn check_vocabulary(tokenizer: Tokenizer, config: &BertConfig) -> Result<Tokenizer, TokenizerProblem> {
    if tokenizer.len() <= config.vocab_size {
        return Ok(tokenizer);
    }
    let why = format!("ids up to {} for vocab_size {} of config.json", tokenizer.len(), config.vocab_size);
    Err(TokenizerProblem::Entry { key: "model.vocab", why })
}

fn facts(
    shape: &EncoderShape<'_>,
    sentence: &Sentence,
    scoring: Option<Scoring>,
    weights: &Weights,
) -> ModelFacts {
    let EncoderShape { family, config, head } = *shape;
    let elements = |rows: usize, cols: usize| rows as u64 * cols as u64;
    let embedding = scoring.is_none().then(|| EmbeddingFacts {
        width: config.hidden_size,
        max_tokens: head.max_tokens,
        pooling: head.pooling,
        pooling_note: sentence.note.clone(),
        normalised: head.normalise,
        prompt: sentence.prompt.clone(),
    });
    let task = scoring.as_ref().map_or(Task::Embed, |scoring| scoring.task);
    let classification = scoring.map(|Scoring { activation, labels, .. }| ClassificationFacts {
        width: config.hidden_size,
        labels,
        activation,
    });
    ModelFacts {
        task,
        architecture: family.model_type.to_owned(),
        name: None,
        parameters: weights.iter().map(|(_, weight)| elements(weight.rows(), weight.cols())).sum(),
        context_tokens: head.max_tokens,
        vocabulary: config.vocab_size,
        layers: config.num_hidden_layers,
        kv_heads: config.num_attention_heads,
        head_dim: config.hidden_size / config.num_attention_heads,
        file_bytes: 0,
        embedding,
        classification,
        chat_template: None,
        warnings: Vec::new(),
    }
}
