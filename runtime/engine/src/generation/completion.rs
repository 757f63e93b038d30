//! One answer: how its tokens are chosen, the text of each, and whether it is the last one.
//!
//! It travels with its request, so that a preempted sequence continues where it was, with its sampler, its
//! grammar and the text that is held back.

use super::stop::StopText;
use crate::grammar::Constraint;
use crate::request::{FinishReason, GenerateError, GenerateParams, StopCause, TokenLogprobs};
use crate::sampling::{Choice, Sampler};
use trustformers_model::{Detokenizer, Tokenizer};
use trustformers_plan::{SampleInput, SampleResult};

/// The answer of one sequence while it is produced.
#[derive(Debug)]
pub(crate) struct Completion {
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopText,
    stop_texts: Vec<String>,
    stop_ids: Vec<u32>,
    /// Control tokens that are text here.
    visible: Vec<u32>,
    /// Whether an end token ends it. Only the warm-up continues after one.
    ends_at_eos: bool,
    /// Tokens that may still be produced.
    remaining_tokens: usize,
}

/// One token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EmittedToken {
    pub(crate) id: u32,
    /// Text that became final with it.
    pub(crate) text: String,
    pub(crate) margin: Option<f32>,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Why it is the last token, where it is.
    pub(crate) end: Option<CompletionEnd>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CompletionEnd {
    pub(crate) reason: FinishReason,
    pub(crate) stop: Option<StopCause>,
}

/// The limits of an answer that do not come from its parameters alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CompletionLimits {
    /// Most tokens to produce, within the context.
    pub(crate) max_tokens: usize,
    /// Whether an end token ends the answer.
    pub(crate) ends_at_eos: bool,
}

impl Completion {
    pub(crate) fn new(
        params: &GenerateParams,
        prompt: &[u32],
        limits: CompletionLimits,
        constraint: Option<Constraint>,
    ) -> Self {
        Self {
            sampler: Sampler::new(params, prompt, constraint),
            detokenizer: Detokenizer::new(),
            stops: StopText::new(&params.stop),
            stop_texts: params.stop.clone(),
            stop_ids: params.stop_token_ids.clone(),
            visible: params.visible_tokens.clone(),
            ends_at_eos: limits.ends_at_eos,
            remaining_tokens: limits.max_tokens,
        }
    }

    /// The same, but never with one of these tokens.
    pub(crate) fn excluding(mut self, ids: &[u32]) -> Self {
        self.sampler.exclude(ids);
        self
    }

    /// Tokens that may still be produced.
    pub(crate) fn remaining_tokens(&self) -> usize {
        self.remaining_tokens
    }

    /// Describes how the next tokens are chosen; see [`Sampler::push_rows`].
    ///
    /// # Errors
    /// The grammar cannot go on.
    pub(crate) fn push_rows(
        &mut self,
        first_row: usize,
        draft: &[u32],
        input: &mut SampleInput,
    ) -> Result<(), GenerateError> {
        self.sampler.push_rows(first_row, draft, input)
    }

    /// Produces the next token from its choice.
    pub(crate) fn next(
        &mut self,
        choice: SampleResult,
        tokenizer: &Tokenizer,
    ) -> Result<EmittedToken, GenerateError> {
        let Choice { id, margin, logprobs, complete } = self.sampler.accept(choice)?;
        self.remaining_tokens = self.remaining_tokens.saturating_sub(1);
        let stopped = |stop| Some(CompletionEnd { reason: FinishReason::Stop, stop });
        let mut end = if self.ends_at_eos && tokenizer.eos_ids().contains(&id) {
            stopped(None)
        } else if self.stop_ids.contains(&id) {
            stopped(Some(StopCause::Token(id)))
        } else {
            None
        };
        // A token that ends the answer adds no text of its own.
        let mut text = if end.is_some() {
            String::new()
        } else {
            let piece = self.text_of(id, tokenizer);
            let passed = self.stops.push(piece);
            if let Some(index) = passed.stop {
                end = stopped(Some(StopCause::Text(self.stop_texts[index].clone())));
                return Ok(EmittedToken { id, text: passed.text, margin, logprobs, end });
            }
            passed.text
        };
        if end.is_none() && complete {
            end = stopped(None);
        }
        if end.is_none() && self.remaining_tokens == 0 {
            end = Some(CompletionEnd { reason: FinishReason::Length, stop: None });
        }
        if end.is_some() {
            // Bytes that never became a character may still complete a stop text; the answer ends anyway.
            text.push_str(&self.stops.push(self.detokenizer.finish()).text);
            text.push_str(&self.stops.finish());
        }
        Ok(EmittedToken { id, text, margin, logprobs, end })
    }

    /// The text that becomes final with a token.
    fn text_of(&mut self, id: u32, tokenizer: &Tokenizer) -> String {
        let bytes = tokenizer.token_bytes(id);
        if bytes.is_empty() && self.visible.contains(&id) {
            let spelled = tokenizer.token(id).unwrap_or_default();
            return self.detokenizer.push(spelled.as_bytes());
        }
        self.detokenizer.push(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_model::Model;
    use trustformers_model::seeded::SeededModel;
    use trustformers_plan::ChosenToken;

    fn model() -> Model {
        Model::from_bytes(Path::new("seeded.gguf"), Arc::new(SeededModel::default().gguf())).unwrap()
    }

    #[test]
    fn a_control_token_is_text_where_the_request_wants_it() {
        let model = model();
        let tag = model.tokenizer().encode("<|im_start|>").unwrap();
        let texts = |params: &GenerateParams| {
            let all = emitted(&model, "a<|im_start|>b", params, 10);
            all.into_iter().map(|token| token.text).collect::<String>()
        };
        let plain = GenerateParams::greedy("", 1);
        assert_eq!(texts(&plain), "ab");
        assert_eq!(texts(&GenerateParams { visible_tokens: tag, ..plain }), "a<|im_start|>b");
    }

    /// The tokens of an answer for which the tokens of a text and then an end token are chosen.
    fn emitted(model: &Model, text: &str, params: &GenerateParams, max_tokens: usize) -> Vec<EmittedToken> {
        let tokenizer = model.tokenizer();
        let limits = CompletionLimits { max_tokens, ends_at_eos: true };
        let mut completion = Completion::new(params, &[], limits, None);
        let mut input = SampleInput::new();
        let wanted = tokenizer.encode(text).unwrap().into_iter().chain(tokenizer.eos_ids().iter().copied());
        let mut all = Vec::new();
        for id in wanted {
            input.clear();
            completion.push_rows(0, &[], &mut input).unwrap();
            assert_eq!(input.len(), 1);
            let choice = ChosenToken { id, margin: None, logprobs: None };
            let token = completion.next(Ok(choice), tokenizer).unwrap();
            let ended = token.end.is_some();
            all.push(token);
            if ended {
                break;
            }
        }
        all
    }

    fn text(all: &[EmittedToken]) -> String {
        all.iter().map(|token| token.text.as_str()).collect()
    }

    fn end(all: &[EmittedToken]) -> Option<(FinishReason, Option<StopCause>)> {
        all.last().and_then(|token| token.end.clone()).map(|end| (end.reason, end.stop))
    }

    #[test]
    fn no_piece_of_a_stop_text_is_emitted() {
        let model = model();
        for stop in ["E", "EN", "END", "🦀END", "D!"] {
            let params =
                GenerateParams { stop: vec!["zz".into(), stop.into()], ..GenerateParams::greedy("", 1) };
            let whole = "hello 🦀END! more";
            let all = emitted(&model, whole, &params, 100);
            assert_eq!(text(&all), whole[..whole.find(stop).unwrap()], "{stop}");
            assert_eq!(end(&all), Some((FinishReason::Stop, Some(StopCause::Text(stop.into())))));
        }
    }

    #[test]
    fn text_that_was_held_back_is_emitted_at_the_end() {
        let model = model();
        let params = GenerateParams { stop: vec!["END".into()], ..GenerateParams::greedy("", 1) };
        let all = emitted(&model, "hello EN", &params, 100);
        assert_eq!((text(&all).as_str(), end(&all)), ("hello EN", Some((FinishReason::Stop, None))));
        let count = model.tokenizer().encode("hello EN").unwrap().len();
        let all = emitted(&model, "hello EN", &params, count);
        assert_eq!((text(&all).as_str(), end(&all)), ("hello EN", Some((FinishReason::Length, None))));
    }

    #[test]
    fn a_stop_token_has_no_text_and_is_named() {
        let model = model();
        let stop = model.tokenizer().encode("x").unwrap()[0];
        let params = GenerateParams { stop_token_ids: vec![stop], ..GenerateParams::greedy("", 1) };
        let all = emitted(&model, "hello x", &params, 100);
        let (last, before) = all.split_last().unwrap();
        assert_eq!((last.id, last.text.as_str()), (stop, ""));
        assert!(text(before).starts_with("hello"));
        assert_eq!(end(&all), Some((FinishReason::Stop, Some(StopCause::Token(stop)))));
    }

    #[test]
    fn half_a_character_at_the_end_is_replaced() {
        let model = model();
        let count = model.tokenizer().encode("a🦀").unwrap().len();
        let params = GenerateParams { stop: vec!["\u{fffd}".into()], ..GenerateParams::greedy("", 1) };
        let cut = emitted(&model, "a🦀", &params, count - 1);
        assert_eq!((text(&cut).as_str(), end(&cut)), ("a", Some((FinishReason::Length, None))));
        let cut = emitted(&model, "a🦀", &GenerateParams::greedy("", 1), count - 1);
        assert_eq!(text(&cut), "a\u{fffd}");
    }
}
