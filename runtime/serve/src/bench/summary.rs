//! What a load came to.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{Failed, TimedAnswer};
use super::drive::Outcome;
use super::percentiles::{Percentiles, rounded};

/// The figures of a load. Times are in milliseconds and of answered requests alone.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Summary {
    pub(super) requests: usize,
    pub(super) answered: usize,
    pub(super) errors: BTreeMap<Failed, usize>,
    /// From the start of the load to the end of its last request.
    wall_s: f64,
    texts: usize,
    prompt_tokens: u64,
    output_tokens: u64,
    first_token_ms: Percentiles,
    per_token_ms: Percentiles,
    longest_gap_ms: Percentiles,
    total_ms: Percentiles,
}

impl Summary {
    /// Adds up; `batch` texts went into each request.
    pub(super) fn of(outcomes: &[Outcome], batch: usize) -> Self {
        let answers: Vec<&TimedAnswer> =
            outcomes.iter().filter_map(|outcome| outcome.answer.as_ref().ok()).collect();
        let mut errors = BTreeMap::new();
        for failed in outcomes.iter().filter_map(|outcome| outcome.answer.as_ref().err()) {
            *errors.entry(*failed).or_default() += 1;
        }
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let percentiles = |time: fn(&TimedAnswer) -> Option<Duration>| {
            Percentiles::new(answers.iter().filter_map(|answer| time(answer)).map(ms))
        };
        Self {
            requests: outcomes.len(),
            answered: answers.len(),
            errors,
            wall_s: outcomes.iter().map(|outcome| outcome.ended.as_secs_f64()).fold(0.0, f64::max),
            texts: answers.len() * batch,
            prompt_tokens: answers.iter().map(|answer| answer.prompt_tokens).sum(),
            output_tokens: answers.iter().map(|answer| answer.output_tokens).sum(),
            first_token_ms: percentiles(|answer| answer.first_token),
            per_token_ms: percentiles(|answer| answer.per_token),
            longest_gap_ms: percentiles(|answer| answer.longest_gap),
            total_ms: percentiles(|answer| Some(answer.total)),
        }
    }

    fn per_s(&self, count: f64) -> f64 {
        if self.wall_s > 0.0 { rounded(count / self.wall_s) } else { 0.0 }
    }

    /// One object.
    pub(super) fn to_json(&self) -> Value {
        let errors: serde_json::Map<String, Value> =
            self.errors.iter().map(|(failed, count)| (failed.as_str().to_owned(), json!(count))).collect();
        json!({
            "requests": self.requests,
            "answered": self.answered,
            "errors": errors,
            "wall_s": rounded(self.wall_s),
            "requests_per_s": self.per_s(self.answered as f64),
            "texts_per_s": self.per_s(self.texts as f64),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_per_s": self.per_s(self.output_tokens as f64),
            "first_token_ms": self.first_token_ms.percentiles_json(),
            "per_token_ms": self.per_token_ms.percentiles_json(),
            "longest_gap_ms": self.longest_gap_ms.percentiles_json(),
            "total_ms": self.total_ms.percentiles_json(),
        })
    }

    /// A table for people.
    pub(super) fn to_text(&self, streams: bool) -> String {
        let mut text = format!(
            "{} of {} requests answered in {:.2} s: {:.2} requests/s",
            self.answered,
            self.requests,
            self.wall_s,
            self.per_s(self.answered as f64)
        );
        // Writing to a string cannot fail.
        if streams {
            let _ = write!(
                text,
                ", {:.1} output tokens/s ({} output tokens, {} of prompts)",
                self.per_s(self.output_tokens as f64),
                self.output_tokens,
                self.prompt_tokens
            );
        } else {
            let _ = write!(text, ", {:.1} texts/s", self.per_s(self.texts as f64));
        }
        for (failed, count) in &self.errors {
            let _ = write!(text, "\nfailed: {count} {}", failed.as_str());
        }
        let _ = write!(text, "\n{:<18}{:>10}{:>10}{:>10}{:>10}", "milliseconds", "p50", "p90", "p99", "max");
        for (name, percentiles) in [
            ("first token", &self.first_token_ms),
            ("per token", &self.per_token_ms),
            ("longest gap", &self.longest_gap_ms),
            ("whole answer", &self.total_ms),
        ] {
            let Some(max) = percentiles.max() else { continue };
            let _ = write!(text, "\n{name:<18}");
            for percent in [50.0, 90.0, 99.0] {
                let _ = write!(text, "{:>10.2}", percentiles.percentile(percent).unwrap_or(max));
            }
            let _ = write!(text, "{max:>10.2}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn answered(total_ms: u64, ended_ms: u64) -> Outcome {
        let answer = TimedAnswer {
            first_token: Some(MS(total_ms / 10)),
            per_token: Some(MS(2)),
            longest_gap: None,
            total: MS(total_ms),
            prompt_tokens: 100,
            output_tokens: 50,
        };
        Outcome { ended: MS(ended_ms), answer: Ok(answer) }
    }

    fn failed(why: Failed, ended_ms: u64) -> Outcome {
        Outcome { ended: MS(ended_ms), answer: Err(why) }
    }

    #[test]
    fn failures_are_counted_by_class_and_make_no_figures() {
        let outcomes = [
            answered(100, 100),
            failed(Failed::Overloaded, 110),
            answered(300, 400),
            failed(Failed::Overloaded, 500),
            failed(Failed::Timeout, 2000),
        ];
        let json = Summary::of(&outcomes, 1).to_json();
        assert_eq!((&json["requests"], &json["answered"]), (&json!(5), &json!(2)));
        assert_eq!(json["errors"], json!({"timeout": 1, "overloaded": 2}));
        // Two answers of fifty tokens in the two seconds until the last request ended.
        assert_eq!((&json["wall_s"], &json["output_tokens_per_s"]), (&json!(2.0), &json!(50.0)));
        assert_eq!((&json["requests_per_s"], &json["prompt_tokens"]), (&json!(1.0), &json!(200)));
        assert_eq!(json["total_ms"], json!({"p50": 100.0, "p90": 300.0, "p99": 300.0, "max": 300.0}));
        assert_eq!(json["first_token_ms"]["p50"], 10.0);
        assert_eq!(json["longest_gap_ms"], Value::Null, "no answer had two tokens");
    }

    #[test]
    fn texts_are_counted_by_batch() {
        let summary = Summary::of(&[answered(100, 500), answered(100, 1000)], 32);
        assert_eq!(summary.to_json()["texts_per_s"], 64.0);
        assert!(summary.to_text(false).contains("64.0 texts/s"));
    }

    #[test]
    fn the_table_names_errors_and_leaves_out_what_was_not_measured() {
        let text = Summary::of(&[answered(100, 1000), failed(Failed::Broken, 10)], 1).to_text(true);
        assert!(text.contains("1 of 2 requests answered") && text.contains("failed: 1 broken"), "{text}");
        assert!(text.contains("first token") && !text.contains("longest gap"), "{text}");
    }
}
