//! From a conversation to the prompt that the model continues: rendered by the model's own chat template.
//!
//! A template is untrusted code with bounds on its work (`trustformers_model::chat`), so this runs away from
//! the threads that serve connections.

use std::time::SystemTime;

use serde_json::{Map, Value};
use trustformers_api::tools::call_grammar;
use trustformers_api::{AnswerSyntax, ApiError, CallSyntax, Conversation, Format, ToolChoice};
use trustformers_model::Model;
use trustformers_model::chat::{ChatError, ChatRequest, ChatTemplate};

/// The field that errors about a conversation name.
const FIELD: &str = "messages";
/// Marks where the text of the last message ends, where that message is continued: characters for private
/// use, so that no template writes them itself.
const CONTINUED: &str = "\u{f8ff}\u{e123}\u{f8ff}";
/// Ends reasoning that the template began, where the answer has a format that reasoning does not fit.
const END_OF_REASONING: &str = "\n</think>\n\n";

/// A conversation as the model's prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RenderedConversation {
    /// The text that the model continues.
    pub(crate) text: String,
    /// How the model writes calls and reasoning.
    pub(crate) syntax: AnswerSyntax,
    /// What the answer must look like.
    pub(crate) format: Option<Format>,
}

/// Renders a conversation for an answer in this format; none: any text.
///
/// # Errors
/// A model without a template, a conversation that its template refuses, and tools that cannot be honoured.
pub(crate) fn render(
    model: &Model,
    conversation: &Conversation,
    format: Option<Format>,
) -> Result<RenderedConversation, ApiError> {
    let mut text = render_text(model, conversation)?;
    let of_tools = model.chat().ok().and_then(ChatTemplate::tools_source);
    let of_tools = of_tools.filter(|_| !conversation.tools.is_empty());
    let source = of_tools.or(model.facts().chat_template.as_deref()).unwrap_or_default();
    let mut syntax = AnswerSyntax::detect(source, &text);
    let format = format_with_calls(syntax.calls, conversation, format)?;
    if let (Some(_), Some(reasoning)) = (&format, &mut syntax.reasoning)
        && reasoning.opened_by_template
    {
        // The format begins with the answer: there is no room for reasoning before it.
        text.truncate(text.trim_end().len());
        text.push_str(END_OF_REASONING);
        reasoning.opened_by_template = false;
    }
    Ok(RenderedConversation { text, syntax, format })
}

/// The format of an answer that may or must be a call.
fn format_with_calls(
    syntax: Option<CallSyntax>,
    conversation: &Conversation,
    format: Option<Format>,
) -> Result<Option<Format>, ApiError> {
    if conversation.tools.is_empty() || conversation.tool_choice == ToolChoice::None {
        return Ok(format);
    }
    let syntax = syntax.ok_or_else(|| {
        let why = "this model's chat template does not say how the model writes calls; leave tools out, or \
                   ask a model that was trained to call functions";
        ApiError::field("tools", why)
    })?;
    match (call_grammar(syntax, conversation)?, format) {
        // A format is that of the content, and an answer that must be a call has none.
        (Some(calls), _) => Ok(Some(Format::Grammar(calls))),
        (None, Some(format)) => call_or(&format, syntax, conversation).map(Some),
        (None, None) => Ok(None),
    }
}

/// What the grammar of calls begins with.
const START: &str = "start:";

/// A call, or JSON of this format, as the model decides.
fn call_or(format: &Format, syntax: CallSyntax, conversation: &Conversation) -> Result<Format, ApiError> {
    let schema = match format {
        Format::JsonObject => r#"{"type": "object"}"#,
        Format::JsonSchema(schema) => schema.as_str(),
        Format::Regex(_) | Format::Grammar(_) => {
            let why = "an expression or a grammar leaves no room for the calls that tools allow; ask for \
                       JSON, or send tool_choice \"none\"";
            return Err(ApiError::field("response_format", why));
        }
    };
    let required = Conversation {
        tools: conversation.tools.clone(),
        tool_choice: ToolChoice::Required,
        parallel_tool_calls: conversation.parallel_tool_calls,
        ..Conversation::default()
    };
    let grammar = call_grammar(syntax, &required)?;
    let calls = grammar
        .as_deref()
        .and_then(|grammar| grammar.strip_prefix(START))
        .ok_or_else(|| ApiError::Internal { message: "the grammar of calls has no start".to_owned() })?;
    Ok(Format::Grammar(format!("{START} calls | json_answer\njson_answer: %json {schema}\ncalls:{calls}")))
}

fn render_text(model: &Model, conversation: &Conversation) -> Result<String, ApiError> {
    let template = model.chat().map_err(|error| refusal(&error))?;
    // A model that must not call is not shown what it could call.
    let shows_tools = conversation.tool_choice != ToolChoice::None;
    let continued = conversation.continue_last.then(|| marked(&conversation.messages)).transpose()?;
    let request = ChatRequest {
        messages: continued.as_deref().unwrap_or(&conversation.messages),
        tools: if shows_tools { &conversation.tools } else { &[] },
        add_generation_prompt: continued.is_none(),
        variables: &conversation.variables,
        now: SystemTime::now(),
    };
    let mut text = template.render(&request).map_err(|error| refusal(&error))?;
    if continued.is_some() {
        let end = text.rfind(CONTINUED).ok_or_else(|| {
            let why = "the model's chat template does not print the last message, so it cannot be continued";
            ApiError::field(FIELD, why)
        })?;
        text.truncate(end);
    }
    Ok(text)
}

/// The messages with a mark at the end of the last one, which is the assistant's.
fn marked(messages: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut messages = messages.to_vec();
    let last: Option<&mut Map<String, Value>> = messages.last_mut().and_then(Value::as_object_mut);
    let content = last
        .filter(|last| last.get("role").and_then(Value::as_str) == Some("assistant"))
        .and_then(|last| last.get_mut("content"));
    match content {
        Some(Value::String(content)) => content.push_str(CONTINUED),
        _ => {
            let why = "the last message cannot be continued: it is no text of the assistant";
            return Err(ApiError::field(FIELD, why));
        }
    }
    Ok(messages)
}

fn refusal(error: &ChatError) -> ApiError {
    match error {
        ChatError::NoTemplate => ApiError::field(
            FIELD,
            "this model has no chat template; send one text as \"prompt\" to /v1/completions or /v1/generate",
        ),
        other => ApiError::field(FIELD, other),
    }
}

/// The control tokens of the model that are these tags. All others of the tags are plain text to it.
pub(crate) fn control_tokens(model: &Model, tags: &[&str]) -> Vec<u32> {
    let tokenizer = model.tokenizer();
    let begins = usize::from(tokenizer.begin_id().is_some());
    let control = |tag: &&str| match tokenizer.encode(tag).ok()?.get(begins..) {
        Some([id]) if tokenizer.token_bytes(*id).is_empty() => Some(*id),
        _ => None,
    };
    tags.iter().filter_map(control).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_model::gguf::GgufValue;
    use trustformers_model::seeded::SeededModel;

    /// ChatML with the calls of Hermes.
    const HERMES: &str = "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>{% endif %}\
        {% for m in messages %}<|im_start|>{{ m.role }} {{ m.content | trim }}<|im_end|>{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant {% if think %}<think>{% endif %}{% endif %}\
        {# </think> #}";

    fn model(template: &str) -> Model {
        let keys = [("tokenizer.chat_template", GgufValue::String(template.to_owned()))];
        let file = SeededModel::default().gguf_with(&keys);
        Model::from_bytes(Path::new("m.gguf"), Arc::new(file)).unwrap()
    }

    fn one_message(role: &str, content: &str) -> Conversation {
        Conversation { messages: vec![json!({"role": role, "content": content})], ..Conversation::default() }
    }

    fn field_of(error: &ApiError) -> &str {
        match error {
            ApiError::InvalidRequest { field: Some(field), .. } => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_conversation_is_rendered_with_the_header_of_the_answer() {
        let rendered = render(&model(HERMES), &one_message("user", "Hi"), None).unwrap();
        assert_eq!(rendered.text, "<|im_start|>user Hi<|im_end|><|im_start|>assistant ");
        assert_eq!(rendered.format, None);
        assert!(rendered.syntax.reasoning.is_some_and(|reasoning| !reasoning.opened_by_template));
    }

    #[test]
    fn the_last_message_of_the_assistant_is_continued_without_a_header() {
        let continued = Conversation { continue_last: true, ..one_message("assistant", "Once ") };
        let rendered = render(&model(HERMES), &continued, None).unwrap();
        assert_eq!(rendered.text, "<|im_start|>assistant Once ");
        for wrong in [one_message("user", "Once"), Conversation::default()] {
            let wrong = Conversation { continue_last: true, ..wrong };
            let error = render(&model(HERMES), &wrong, None).unwrap_err();
            assert_eq!(field_of(&error), FIELD);
        }
        let silent = Conversation { continue_last: true, ..one_message("assistant", "Once") };
        let error = render(&model("{{ messages | length }}"), &silent, None).unwrap_err();
        assert!(error.to_string().contains("does not print"), "{error}");
    }

    #[test]
    fn models_and_conversations_that_do_not_fit_are_refused_with_what_to_do() {
        let plain = Model::from_bytes(Path::new("m.gguf"), Arc::new(SeededModel::default().gguf())).unwrap();
        let error = render(&plain, &one_message("user", "Hi"), None).unwrap_err();
        assert_eq!(field_of(&error), FIELD);
        assert!(error.to_string().contains("/v1/completions"), "{error}");
        let strict = model("{{ raise_exception('roles must alternate') }}");
        let error = render(&strict, &one_message("user", "Hi"), None).unwrap_err();
        assert!(field_of(&error) == FIELD && error.to_string().contains("roles must alternate"), "{error}");
    }

    fn with_tools(choice: ToolChoice) -> Conversation {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
        Conversation { tools: vec![tool], tool_choice: choice, ..one_message("user", "Hi") }
    }

    #[test]
    fn tools_are_shown_unless_none_may_be_called_and_refused_where_no_syntax_is_known() {
        let rendered = render(&model(HERMES), &with_tools(ToolChoice::Auto), None).unwrap();
        assert!(rendered.text.contains("\"name\": \"f\"") && rendered.format.is_none(), "{rendered:?}");
        assert_eq!(rendered.syntax.calls, Some(CallSyntax::Hermes));
        let none = render(&model(HERMES), &with_tools(ToolChoice::None), None).unwrap();
        assert!(!none.text.contains("\"f\""), "{none:?}");
        let unknown = model("{{ messages[0].content }}");
        let error = render(&unknown, &with_tools(ToolChoice::Auto), None).unwrap_err();
        assert_eq!(field_of(&error), "tools");
        assert!(render(&unknown, &with_tools(ToolChoice::None), None).is_ok());
    }

    #[test]
    fn a_template_of_its_own_renders_conversations_with_tools() {
        let text = |template: &str| GgufValue::String(template.to_owned());
        let file = SeededModel::default().gguf_with(&[
            ("tokenizer.chat_template", text("plain {{ messages[0].content }}")),
            ("tokenizer.chat_template.tool_use", text(HERMES)),
        ]);
        let model = Model::from_bytes(Path::new("m.gguf"), Arc::new(file)).unwrap();
        let rendered = render(&model, &with_tools(ToolChoice::Auto), None).unwrap();
        assert!(rendered.text.contains("\"name\": \"f\""), "{rendered:?}");
        assert_eq!(rendered.syntax.calls, Some(CallSyntax::Hermes));
        assert_eq!(render(&model, &one_message("user", "Hi"), None).unwrap().text, "plain Hi");
    }

    #[test]
    fn a_required_call_has_a_grammar_whatever_the_format_of_the_content() {
        for choice in [ToolChoice::Required, ToolChoice::Named("f".into())] {
            let rendered = render(&model(HERMES), &with_tools(choice.clone()), None).unwrap();
            assert!(matches!(rendered.format, Some(Format::Grammar(_))), "{rendered:?}");
            let beside = render(&model(HERMES), &with_tools(choice), Some(Format::JsonObject)).unwrap();
            assert_eq!(beside.format, rendered.format);
        }
    }

    #[test]
    fn where_the_model_decides_the_answer_is_a_call_or_json_of_the_format() {
        let asked = with_tools(ToolChoice::Auto);
        let schema = Format::JsonSchema(r#"{"const": 7}"#.into());
        let rendered = render(&model(HERMES), &asked, Some(schema)).unwrap();
        let Some(Format::Grammar(grammar)) = rendered.format else { panic!("{:?}", rendered.format) };
        assert!(grammar.starts_with("start: calls | json_answer\n"), "{grammar}");
        assert!(grammar.contains("json_answer: %json {\"const\": 7}\n"), "{grammar}");
        assert_eq!(grammar.matches(START).count(), 1, "{grammar}");
        let error = render(&model(HERMES), &asked, Some(Format::Regex("a".into()))).unwrap_err();
        assert_eq!(field_of(&error), "response_format");
        let none = with_tools(ToolChoice::None);
        let rendered = render(&model(HERMES), &none, Some(Format::JsonObject)).unwrap();
        assert_eq!(rendered.format, Some(Format::JsonObject));
    }

    #[test]
    fn reasoning_that_the_template_began_ends_before_a_format() {
        let mut conversation = one_message("user", "Hi");
        conversation.variables.insert("think".into(), json!(true));
        let open = render(&model(HERMES), &conversation, None).unwrap();
        assert!(open.syntax.reasoning.is_some_and(|reasoning| reasoning.opened_by_template));
        let closed = render(&model(HERMES), &conversation, Some(Format::JsonObject)).unwrap();
        assert!(closed.text.ends_with("assistant <think>\n</think>\n\n"), "{}", closed.text);
        assert!(closed.syntax.reasoning.is_some_and(|reasoning| !reasoning.opened_by_template));
    }

    #[test]
    fn only_control_tokens_have_to_be_made_visible() {
        let model = model(HERMES);
        let tags = ["<|im_start|>", "<tool_call>", "a"];
        assert_eq!(control_tokens(&model, &tags), [1]);
    }
}
