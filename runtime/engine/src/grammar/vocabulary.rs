//! A model's vocabulary as llguidance wants it: a trie of the tokens' bytes, and the tokenizer.

use llguidance::toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use std::sync::Arc;
use trustformers_model::Model;

/// The trie and the tokenizer of one model.
pub(super) struct Vocabulary {
    trie: TokTrie,
    model: Arc<Model>,
}

impl Vocabulary {
    pub(super) fn new(model: &Arc<Model>) -> Result<Self, String> {
        let tokenizer = model.tokenizer();
        let vocab_size =
            u32::try_from(tokenizer.len()).map_err(|_| "the vocabulary is too large".to_owned())?;
        // Control tokens have no bytes, so no grammar reaches them. A token that begins with llguidance's
        // mark of special tokens, which no UTF-8 text holds, is left out the same way.
        let words: Vec<Vec<u8>> = (0..vocab_size)
            .map(|id| tokenizer.token_bytes(id))
            .map(|bytes| if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) { &[] } else { bytes })
            .map(<[u8]>::to_vec)
            .collect();
        let eos = tokenizer.eos_ids();
        let info = TokRxInfo::new(vocab_size, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let trie = TokTrie::from(&info, &words);
        let trie = if eos.is_empty() { trie } else { trie.with_eos_tokens(eos) };
        Ok(Self { trie, model: Arc::clone(model) })
    }

    /// The ids of a text as the model would read it in the middle of an answer; `None` where they do not give
    /// exactly this text, because it spells a special token or needs a byte that the vocabulary lacks.
    fn encode(&self, text: &str) -> Option<Vec<TokenId>> {
        let tokenizer = self.model.tokenizer();
        let mut ids = tokenizer.encode(text).ok()?;
        if tokenizer.begin_id().is_some() && !ids.is_empty() {
            ids.remove(0);
        }
        (self.trie.decode_raw(&ids) == text.as_bytes()).then_some(ids)
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.encode(text).unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}
