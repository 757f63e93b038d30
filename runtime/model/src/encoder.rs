//! Loading a checkpoint that embeds texts: its files, checked against each other, become a [`Model`].

use crate::arch::bert::{self, Head};
use crate::chat::{self, ChatError, ChatTemplate};
use crate::checkpoint::{
    BertConfig, CONFIG, CheckpointFiles, CheckpointProblem, Sentence, TOKENIZER, WEIGHTS,
};
use crate::error::{LoadError, TokenizerProblem};
use crate::model::{EmbeddingFacts, Model, ModelFacts, TextPreparation};
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

/// What can be loaded from a folder.
const ARCHITECTURE: &str = "bert";

/// Reads and checks the checkpoint.
pub(crate) fn load(files: &CheckpointFiles, progress: &mut OnRead<'_>) -> Result<Model, LoadError> {
    let ModelType { model_type } = files.json(CONFIG)?;
    if model_type != ARCHITECTURE {
        let supported = format!("{ARCHITECTURE} in a folder; others as a .gguf file");
        return Err(LoadError::Architecture { path: files.path(CONFIG), found: model_type, supported });
    }
    let config: BertConfig = files.json(CONFIG)?;
    config.check().map_err(|problem| files.wrong(CONFIG, problem))?;
    let sentence = Sentence::read(files)?;
    let tokenizer_file = files.bytes(TOKENIZER)?;
    files.refuse_foreign(TOKENIZER, &tokenizer_file)?;
    let tokenizer = Tokenizer::from_json(&tokenizer_file)
        .and_then(|tokenizer| check_vocabulary(tokenizer, &config))
        .map_err(|problem| LoadError::Tokenizer { path: files.path(TOKENIZER), problem })?;
    let head = head(&config, &sentence, &tokenizer).map_err(|problem| files.wrong(CONFIG, problem))?;
    let stored = files.tensors(progress)?;
    let mut weights = bert::weights(&config, &stored).map_err(|problem| files.wrong(WEIGHTS, problem))?;
    let architecture =
        bert::resolve(&config, head, &mut weights).map_err(|problem| files.wrong(WEIGHTS, problem))?;
    let mut facts = facts(&config, &sentence, head, &weights);
    facts.file_bytes = stored.file_bytes() as u64;
    let (template, special) = chat::config::of_checkpoint(files)?;
    let chat = match &template {
        Some(template) => ChatTemplate::new(template, special),
        None => Err(ChatError::NoTemplate),
    };
    facts.chat_template = template;
    let preparation = TextPreparation { prompt: sentence.prompt, lowercase: sentence.lowercase };
    let model = Model { weights: Arc::new(weights), tokenizer, facts, architecture, chat, preparation };
    model.check_plan().map_err(|problem| LoadError::Plan { path: files.path(CONFIG), problem })?;
    Ok(model)
}

/// Texts are as long as the checkpoint says, and never longer than its table of positions.
fn head(config: &BertConfig, sentence: &Sentence, tokenizer: &Tokenizer) -> Result<Head, CheckpointProblem> {
    let positions = config.max_position_embeddings;
    let max_tokens = sentence.max_tokens.map_or(positions, |tokens| tokens.min(positions));
    let special = tokenizer.special_tokens();
    if max_tokens <= special {
        let why = format!(
            "a text may have {max_tokens} tokens (this key, or max_seq_length of sentence_bert_config.json), but the \
             {special} special tokens alone need them all"
        );
        return Err(CheckpointProblem::Malformed { key: "max_position_embeddings", why });
    }
    Ok(Head { pooling: sentence.pooling, normalise: sentence.normalised, max_tokens })
}

/// More rows than tokens are fine; a token without a row is not.
fn check_vocabulary(tokenizer: Tokenizer, config: &BertConfig) -> Result<Tokenizer, TokenizerProblem> {
    if tokenizer.len() <= config.vocab_size {
        return Ok(tokenizer);
    }
    let why = format!("ids up to {} for vocab_size {} of config.json", tokenizer.len(), config.vocab_size);
    Err(TokenizerProblem::Entry { key: "model.vocab", why })
}

fn facts(config: &BertConfig, sentence: &Sentence, head: Head, weights: &Weights) -> ModelFacts {
    let elements = |rows: usize, cols: usize| rows as u64 * cols as u64;
    ModelFacts {
        task: Task::Embed,
        architecture: ARCHITECTURE.to_owned(),
        name: None,
        parameters: weights.iter().map(|(_, weight)| elements(weight.rows(), weight.cols())).sum(),
        context_tokens: head.max_tokens,
        vocabulary: config.vocab_size,
        layers: config.num_hidden_layers,
        kv_heads: config.num_attention_heads,
        head_dim: config.hidden_size / config.num_attention_heads,
        file_bytes: 0,
        embedding: Some(EmbeddingFacts {
            width: config.hidden_size,
            max_tokens: head.max_tokens,
            pooling: head.pooling,
            pooling_note: sentence.note.clone(),
            normalised: head.normalise,
            prompt: sentence.prompt.clone(),
        }),
        chat_template: None,
        warnings: Vec::new(),
    }
}
