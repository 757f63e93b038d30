//! What a sequence says: from a row of logits to a token, its text, and whether that was the last.
//!
//! It travels with its request, so that a sequence which has to begin again goes on where it was: sampler, grammar,
//! text that is held back and all.

use crate::grammar::Constraint;
use crate::request::{FinishReason, GenerateError, GenerateParams, StopCause, TokenLogprobs};
use crate::sampler::{Choice, Sampler, Scratch};
use crate::stop::StopText;
use trustformers_model::{Detokenizer, Tokenizer};

/// One sequence's answer in the making.
#[derive(Debug)]
pub(crate) struct Answer {
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopText,
    stop_texts: Vec<String>,
    stop_ids: Vec<u32>,
    /// Whether an end token ends it. Only the warm-up goes on.
    ends_at_eos: bool,
    /// Tokens that may still come.
    left: usize,
}

/// One token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Said {
    pub(crate) id: u32,
    /// Text that became final with it.
    pub(crate) text: String,
    pub(crate) margin: Option<f32>,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Why it was the last token, where it was.
    pub(crate) end: Option<End>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    pub(crate) stop: Option<StopCause>,
}

impl Answer {
    /// An answer of at most `max_tokens` tokens.
    pub(crate) fn new(
        params: &GenerateParams,
        prompt: &[u32],
        max_tokens: usize,
        ends_at_eos: bool,
        constraint: Option<Constraint>,
    ) -> Self {
        Self {
            sampler: Sampler::new(params, prompt, constraint),
            detokenizer: Detokenizer::new(),
            stops: StopText::new(&params.stop),
            stop_texts: params.stop.clone(),
            stop_ids: params.stop_token_ids.clone(),
            ends_at_eos,
            left: max_tokens,
        }
    }

    /// Tokens that may still come.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Uses the time in which the device computes.
    pub(crate) fn prepare(&mut self) {
        self.sampler.prepare();
    }

    /// Says the next token.
    pub(crate) fn next(
        &mut self,
        logits: &[f32],
        scratch: &mut Scratch,
        tokenizer: &Tokenizer,
    ) -> Result<Said, GenerateError> {
        let Choice { id, margin, logprobs, complete } = self.sampler.choose(logits, scratch)?;
        self.left = self.left.saturating_sub(1);
        let stopped = |stop| Some(End { reason: FinishReason::Stop, stop });
        let mut end = if self.ends_at_eos && tokenizer.eos_ids().contains(&id) {
            stopped(None)
        } else if self.stop_ids.contains(&id) {
            stopped(Some(StopCause::Token(id)))
        } else {
            None
        };
        // A token that ends the answer says nothing itself.
        let mut text = if end.is_some() {
            String::new()
        } else {
            let passed = self.stops.push(self.detokenizer.push(tokenizer.token_bytes(id)));
            if let Some(index) = passed.stop {
                end = stopped(Some(StopCause::Text(self.stop_texts[index].clone())));
                return Ok(Said { id, text: passed.text, margin, logprobs, end });
            }
            passed.text
        };
        if end.is_none() && complete {
            end = stopped(None);
        }
        if end.is_none() && self.left == 0 {
            end = Some(End { reason: FinishReason::Length, stop: None });
        }
        if end.is_some() {
            // What never became a character may still complete a stop string, but only ends what has ended.
            text.push_str(&self.stops.push(self.detokenizer.finish()).text);
            text.push_str(&self.stops.finish());
        }
        Ok(Said { id, text, margin, logprobs, end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_model::Model;
    use trustformers_model::seeded::SeededModel;

    fn model() -> Model {
        Model::from_bytes(Path::new("seeded.gguf"), Arc::new(SeededModel::default().gguf())).unwrap()
    }

    /// What is said when the model wants exactly the tokens of a text and then its end token.
    fn said(model: &Model, text: &str, params: &GenerateParams, max_tokens: usize) -> Vec<Said> {
        let tokenizer = model.tokenizer();
        let mut answer = Answer::new(params, &[], max_tokens, true, None);
        let mut scratch = Scratch::default();
        let wanted = tokenizer.encode(text).unwrap().into_iter().chain(tokenizer.eos_ids().iter().copied());
        let mut all = Vec::new();
        for id in wanted {
            let mut logits = vec![0.0; tokenizer.len()];
            logits[id as usize] = 9.0;
            let said = answer.next(&logits, &mut scratch, tokenizer).unwrap();
            let ended = said.end.is_some();
            all.push(said);
            if ended {
                break;
            }
        }
        all
    }

    fn text(all: &[Said]) -> String {
        all.iter().map(|said| said.text.as_str()).collect()
    }

    fn end(all: &[Said]) -> Option<(FinishReason, Option<StopCause>)> {
        all.last().and_then(|said| said.end.clone()).map(|end| (end.reason, end.stop))
    }

    #[test]
    fn no_part_of_a_stop_string_is_said_wherever_tokens_are_cut() {
        let model = model();
        for stop in ["E", "EN", "END", "🦀END", "D!"] {
            let params =
                GenerateParams { stop: vec!["zz".into(), stop.into()], ..GenerateParams::greedy("", 1) };
            let whole = "hello 🦀END! more";
            let all = said(&model, whole, &params, 100);
            assert_eq!(text(&all), whole[..whole.find(stop).unwrap()], "{stop}");
            assert_eq!(end(&all), Some((FinishReason::Stop, Some(StopCause::Text(stop.into())))));
        }
    }

    #[test]
    fn what_was_held_back_for_nothing_is_said_at_the_end() {
        let model = model();
        let params = GenerateParams { stop: vec!["END".into()], ..GenerateParams::greedy("", 1) };
        let all = said(&model, "hello EN", &params, 100);
        assert_eq!((text(&all).as_str(), end(&all)), ("hello EN", Some((FinishReason::Stop, None))));
        let count = model.tokenizer().encode("hello EN").unwrap().len();
        let all = said(&model, "hello EN", &params, count);
        assert_eq!((text(&all).as_str(), end(&all)), ("hello EN", Some((FinishReason::Length, None))));
    }

    #[test]
    fn a_stop_token_says_nothing_itself_and_is_named() {
        let model = model();
        let stop = model.tokenizer().encode("x").unwrap()[0];
        let params = GenerateParams { stop_token_ids: vec![stop], ..GenerateParams::greedy("", 1) };
        let all = said(&model, "hello x", &params, 100);
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
        let cut = said(&model, "a🦀", &params, count - 1);
        assert_eq!((text(&cut).as_str(), end(&cut)), ("a", Some((FinishReason::Length, None))));
        let cut = said(&model, "a🦀", &GenerateParams::greedy("", 1), count - 1);
        assert_eq!(text(&cut), "a\u{fffd}");
    }
}
