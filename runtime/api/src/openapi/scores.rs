//! The bodies and answers of the routes that give scores.

use serde_json::Value;

use super::native::{model_name, priority};
use super::schema::{
    MAX_U32, any_of, count, described, flag, list, list_of, number, object, open_object, reference, text,
    whole, word,
};
use crate::Aggregation;
use crate::classify::MAX_TEXTS;
use crate::rerank::MAX_DOCUMENTS;

/// The schemas of these routes, by name.
pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        ("ClassifyRequest", classify_request()),
        ("Classified", classified()),
        ("RerankRequest", rerank_request()),
        ("Reranked", reranked()),
        ("TokensRead", tokens_read()),
    ]
}

fn truncate() -> Value {
    flag("Whether texts that are too long are cut instead of refused; true where it is left out.")
}

fn raw_scores() -> Value {
    flag("Whether the scores are the logits as the model gives them.")
}

fn tokens_read() -> Value {
    open_object()
        .required("prompt_tokens", count("Tokens that were read."))
        .required("total_tokens", count("The same."))
        .build()
}

fn classify_request() -> Value {
    let one_or_two = || list_of(1, 2, text("A text."));
    let input = any_of([
        text("A text."),
        list_of(
            1,
            MAX_TEXTS,
            any_of([text("A text."), described(one_or_two(), "Two texts that are read together.")]),
        ),
    ]);
    let inputs = any_of([
        text("A text."),
        described(one_or_two(), "One text, or two that are read together."),
        list_of(1, MAX_TEXTS, one_or_two()),
    ]);
    object()
        .optional("input", described(input, "The texts. Either this or inputs is given."))
        .optional("inputs", described(inputs, "The same in the form of text-embeddings-inference."))
        .optional("model", model_name())
        .optional("top_k", whole(1, MAX_U32, "Labels of each text in the answer; all where it is left out."))
        .optional("raw_scores", raw_scores())
        .optional("aggregation_strategy", aggregation())
        .optional("truncate", truncate())
        .optional("priority", priority())
        .build()
}

fn aggregation() -> Value {
    let words = Aggregation::ALL.map(Aggregation::as_str);
    word(
        &words,
        "How labels of tokens become entities, of a model that labels tokens; none where it is left out.",
    )
}

fn classified() -> Value {
    let score = open_object()
        .required("label", text("A label of the model."))
        .required("score", number("Its score."))
        .build();
    let entity = open_object()
        .sometimes("entity", text("The label of a token."))
        .sometimes("entity_group", text("The label of a group of tokens."))
        .required("score", number("Its score."))
        .sometimes("index", count("The place of the token among those of the text."))
        .required("word", text("The token, or the characters of the group."))
        .required("start", count("The place of its first character in the text."))
        .required("end", count("The place behind its last character."))
        .build();
    let result = open_object()
        .sometimes("scores", described(list(score), "The labels of the text, highest score first."))
        .sometimes(
            "entities",
            described(list(entity), "Of a model that labels tokens, in the order of the text."),
        )
        .build();
    open_object()
        .required("results", described(list(result), "One for each text, in the order of the request."))
        .required("model", text("The model that answered."))
        .required("usage", reference("TokensRead"))
        .required("id", text("The id of the answer."))
        .required("model_digest", text("sha256 of the model's files."))
        .sometimes("revision", text("The revision of the model."))
        .required("latency_ms", number("Milliseconds from the request to the answer."))
        .sometimes("truncated", list(count("The place of a text that was cut.")))
        .build()
}

fn rerank_request() -> Value {
    let document = open_object().required("text", text("The document's text.")).build();
    let documents = || list_of(1, MAX_DOCUMENTS, any_of([text("A document."), document.clone()]));
    object()
        .required("query", text("What the documents are to answer; not empty."))
        .optional("documents", described(documents(), "The documents. Either this or texts is given."))
        .optional("texts", described(documents(), "The same in the form of text-embeddings-inference."))
        .optional("model", model_name())
        .optional("top_n", whole(1, MAX_U32, "Documents of the answer; all where it is left out."))
        .optional("return_documents", flag("Whether the answer repeats the documents."))
        .optional("return_text", flag("The same in the form of text-embeddings-inference."))
        .optional("raw_scores", raw_scores())
        .optional("truncate", truncate())
        .optional("priority", priority())
        .build()
}

fn reranked() -> Value {
    let document = open_object().required("text", text("The document.")).build();
    let result = open_object()
        .required("index", count("The place of the document in the request."))
        .required("score", number("How well it answers the query."))
        .required("relevance_score", number("The same, as clients of Cohere and Jina read it."))
        .sometimes("document", document)
        .build();
    open_object()
        .required("results", described(list(result), "The documents, best first."))
        .required("model", text("The model that answered."))
        .required("usage", reference("TokensRead"))
        .required("id", text("The id of the answer."))
        .required("model_digest", text("sha256 of the model's files."))
        .sometimes("revision", text("The revision of the model."))
        .required("latency_ms", number("Milliseconds from the request to the answer."))
        .sometimes("truncated", list(count("The place of a document that was cut, or whose query was.")))
        .build()
}
