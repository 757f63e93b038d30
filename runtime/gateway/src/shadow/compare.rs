//! How alike two answers to one request are.
//!
//! What counts is what a model said: its texts and its vectors. Ids, times and tokens differ from answer to
//! answer and are not looked at.

use prost::Message;
use serde_json::Value;
use trustformers_proto::v1::{EmbedResponse, GenerateResponse, GenerateStreamResponse};

/// The protocol of two answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AnswerFormat {
    /// A JSON value.
    Json,
    /// Server-sent events whose data are JSON.
    Events,
    /// One message of gRPC: `GenerateResponse`.
    Generated,
    /// Messages of gRPC: `GenerateStreamResponse`.
    GeneratedStream,
    /// One message of gRPC: `EmbedResponse`.
    Embedded,
}

/// What two answers have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Comparison {
    /// The same texts, or vectors, to the last bit.
    Same,
    /// Texts that differ: 1 minus their edit distance, divided by the longer one's characters.
    Texts(f64),
    /// Vectors that differ: the smallest cosine of a pair.
    Vectors(f64),
    /// One of the answers has no text and no vector, or can't be read.
    Unknown,
}

/// Characters of each text that are compared. The work grows with the product: at most a million steps for a
/// pair, some 2 ms.
const MOST_CHARS: usize = 1000;
/// Names of members of JSON answers that hold what a model content.
const TEXTS: [&str; 7] =
    ["text", "content", "delta", "text_output", "arguments", "reasoning_content", "thinking"];
/// A gRPC message begins with a flag for compression and a length.
const FRAME_HEAD_BYTES: usize = 5;

/// What a model said in one answer.
#[derive(Debug, Default, PartialEq)]
struct Content {
    texts: Vec<String>,
    vectors: Vec<Vec<f32>>,
}

/// Compares two answers.
pub(crate) fn compare(format: AnswerFormat, one: &[u8], other: &[u8]) -> Comparison {
    let (Some(one), Some(other)) = (read(format, one), read(format, other)) else {
        return Comparison::Unknown;
    };
    if one == Content::default() || other == Content::default() {
        return Comparison::Unknown;
    }
    if one == other {
        return Comparison::Same;
    }
    if one.vectors != other.vectors {
        return Comparison::Vectors(least_cosine(&one.vectors, &other.vectors));
    }
    Comparison::Texts(similarity(&one.texts.join("\n"), &other.texts.join("\n")))
}

fn read(format: AnswerFormat, answer: &[u8]) -> Option<Content> {
    match format {
        AnswerFormat::Json => {
            let mut content = Content::default();
            collect(&serde_json::from_slice(answer).ok()?, &mut content);
            Some(content)
        }
        AnswerFormat::Events => Some(Content::of_text(text_of_events(std::str::from_utf8(answer).ok()?))),
        AnswerFormat::Generated => {
            let GenerateResponse { text, .. } = GenerateResponse::decode(messages(answer).next()?).ok()?;
            Some(Content { texts: vec![text], vectors: Vec::new() })
        }
        AnswerFormat::GeneratedStream => {
            let pieces = messages(answer).map(GenerateStreamResponse::decode);
            let pieces: Result<String, _> = pieces.map(|piece| piece.map(|piece| piece.text)).collect();
            Some(Content::of_text(pieces.ok()?))
        }
        AnswerFormat::Embedded => {
            let EmbedResponse { data, .. } = EmbedResponse::decode(messages(answer).next()?).ok()?;
            let vectors = data.into_iter().map(|embedding| embedding.values).collect();
            Some(Content { texts: Vec::new(), vectors })
        }
    }
}

impl Content {
    /// The text of a stream; nothing where it has none.
    fn of_text(text: String) -> Self {
        let texts = Some(text).filter(|text| !text.is_empty()).into_iter().collect();
        Self { texts, vectors: Vec::new() }
    }
}

/// The messages of a gRPC body that are not compressed, up to one that is.
fn messages(mut body: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (head, rest) = body.split_at_checked(FRAME_HEAD_BYTES)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let (message, rest) = rest.split_at_checked(length).filter(|_| head[0] == 0)?;
        body = rest;
        Some(message)
    })
}

/// All texts of a stream of events, one behind the other.
fn text_of_events(events: &str) -> String {
    let mut content = Content::default();
    for data in events.lines().filter_map(|line| line.strip_prefix("data:")) {
        // `[DONE]` is no JSON.
        if let Ok(value) = serde_json::from_str(data) {
            collect(&value, &mut content);
        }
    }
    content.texts.concat()
}

/// Finds texts and vectors, wherever the protocol of the answer has them.
fn collect(value: &Value, content: &mut Content) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| collect(item, content)),
        Value::Object(members) => {
            for (name, member) in members {
                match member {
                    Value::String(text) if TEXTS.contains(&name.as_str()) => content.texts.push(text.clone()),
                    // KServe's outputs, and embeddings.
                    Value::Array(items) if name == "data" || name == "embedding" => {
                        let numbers: Option<Vec<f32>> =
                            items.iter().map(|item| item.as_f64().map(|number| number as f32)).collect();
                        let texts: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
                        match (numbers, texts) {
                            (Some(numbers), _) => content.vectors.push(numbers),
                            (None, Some(texts)) => content.texts.extend(texts.into_iter().map(str::to_owned)),
                            (None, None) => items.iter().for_each(|item| collect(item, content)),
                        }
                    }
                    _ => collect(member, content),
                }
            }
        }
        _ => {}
    }
}

/// 0 where the vectors do not belong together.
fn least_cosine(one: &[Vec<f32>], other: &[Vec<f32>]) -> f64 {
    let fits = one.len() == other.len() && one.iter().zip(other).all(|(a, b)| a.len() == b.len());
    if !fits {
        return 0.0;
    }
    one.iter().zip(other).map(|(a, b)| cosine(a, b)).fold(1.0, f64::min)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum() };
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { (dot(a, b) / lengths).clamp(-1.0, 1.0) } else { 0.0 }
}

/// 1 minus the edit distance of two texts, divided by the longer one's characters.
fn similarity(one: &str, other: &str) -> f64 {
    let chars = |text: &str| text.chars().take(MOST_CHARS).collect::<Vec<char>>();
    let (one, other) = (chars(one), chars(other));
    let longer = one.len().max(other.len());
    if longer == 0 {
        return 1.0;
    }
    // One row of the table of distances between the beginnings of both.
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, a) in one.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, b) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    1.0 - row[other.len()] as f64 / longer as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_proto::v1::Embedding;

    fn json(one: &str, other: &str) -> Comparison {
        compare(AnswerFormat::Json, one.as_bytes(), other.as_bytes())
    }

    fn framed(message: &impl Message) -> Vec<u8> {
        let message = message.encode_to_vec();
        [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat()
    }

    #[test]
    fn only_what_a_model_said_counts() {
        let chat = |id: &str, text: &str| {
            format!(
                r#"{{"id": "{id}", "choices": [{{"message": {{"role": "assistant", "content": "{text}"}}}}]}}"#
            )
        };
        assert_eq!(json(&chat("1", "Paris"), &chat("2", "Paris")), Comparison::Same);
        assert_eq!(json(&chat("1", "kitten"), &chat("2", "sitten")), Comparison::Texts(1.0 - 1.0 / 6.0));
        let generate = |text: &str| format!(r#"{{"text": "{text}", "tokens": [1, 2]}}"#);
        assert_eq!(json(&generate("abc"), &generate("")), Comparison::Texts(0.0));
        let kserve = |text: &str| {
            format!(r#"{{"outputs": [{{"datatype": "BYTES", "data": ["{text}"]}}], "id": "{text}"}}"#)
        };
        assert_eq!(json(&kserve("ab"), &kserve("ac")), Comparison::Texts(0.5));
        for (one, other) in [("{", "{}"), ("{}", "{}"), (r#"{"text": "a"}"#, r#"{"error": "b"}"#)] {
            assert_eq!(json(one, other), Comparison::Unknown, "{one} {other}");
        }
    }

    #[test]
    fn vectors_have_a_cosine() {
        let list = |vectors: &str| format!(r#"{{"data": [{vectors}]}}"#);
        let one = list(r#"{"embedding": [1.0, 0.0], "index": 0}, {"embedding": [0.0, 2.0], "index": 1}"#);
        assert_eq!(json(&one, &one), Comparison::Same);
        let turned = list(r#"{"embedding": [2.0, 0.0], "index": 0}, {"embedding": [3.0, 3.0], "index": 1}"#);
        let Comparison::Vectors(cosine) = json(&one, &turned) else { panic!("vectors differ") };
        assert!((cosine - 0.5_f64.sqrt()).abs() < 1e-6, "{cosine}");
        assert_eq!(json(&one, &list(r#"{"embedding": [1.0]}"#)), Comparison::Vectors(0.0));
    }

    #[test]
    fn messages_of_grpc_are_read() {
        let text = |text: &str| framed(&GenerateResponse { text: text.to_owned(), ..Default::default() });
        let of = |one: &[u8], other: &[u8]| compare(AnswerFormat::Generated, one, other);
        assert_eq!(of(&text("a"), &text("a")), Comparison::Same);
        assert_eq!(of(&text("ab"), &text("ac")), Comparison::Texts(0.5));
        assert_eq!(of(&text("a"), b""), Comparison::Unknown);
        let vector = |values: Vec<f32>| {
            framed(&EmbedResponse { data: vec![Embedding { values }], ..Default::default() })
        };
        let compared = compare(AnswerFormat::Embedded, &vector(vec![1.0, 0.0]), &vector(vec![0.0, 1.0]));
        assert_eq!(compared, Comparison::Vectors(0.0));
    }

    #[test]
    fn streams_are_compared_as_the_texts_that_they_make() {
        let chat = |pieces: &[&str]| -> String {
            let event = |piece: &&str| {
                format!("data: {{\"choices\": [{{\"delta\": {{\"content\": \"{piece}\"}}}}]}}\n\n")
            };
            pieces.iter().map(event).chain(["data: [DONE]\n\n".to_owned()]).collect()
        };
        let of = |one: &[&str], other: &[&str]| {
            compare(AnswerFormat::Events, chat(one).as_bytes(), chat(other).as_bytes())
        };
        assert_eq!(of(&["Par", "is"], &["P", "aris"]), Comparison::Same);
        assert_eq!(of(&["Par", "is"], &["Par", "os"]), Comparison::Texts(0.8));
        assert_eq!(of(&["Paris"], &[]), Comparison::Unknown);
        let stream = |pieces: &[&str]| -> Vec<u8> {
            let message = |text: &&str| {
                framed(&GenerateStreamResponse { text: (*text).to_owned(), ..Default::default() })
            };
            pieces.iter().flat_map(message).collect()
        };
        let compared = compare(AnswerFormat::GeneratedStream, &stream(&["a", "b"]), &stream(&["ab", ""]));
        assert_eq!(compared, Comparison::Same);
    }

    #[test]
    fn long_texts_are_compared_at_their_beginnings() {
        let (one, other) = ("a".repeat(1 << 20), format!("{}b", "a".repeat(1 << 20)));
        assert!((similarity(&one, &other) - 1.0).abs() < 1e-9);
        assert!(similarity(&one, &"b".repeat(1 << 20)) < 1e-9);
    }
}
