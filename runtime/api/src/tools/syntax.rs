//! The families of call syntax, and how a chat template tells its family.
//!
//! No file of a model names its family. But a template that offers tools shows the model how to write a call,
//! or prints the calls of earlier answers, so that the tags of the family stand in its source.

/// How a model writes tool calls and reasoning. The default is neither: all of an answer is content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AnswerSyntax {
    /// The family of its calls; none where the template does not offer tools in a family that is built here.
    pub calls: Option<CallSyntax>,
    /// How it writes reasoning, where it does.
    pub reasoning: Option<ReasoningSyntax>,
}

/// How a family of models writes tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallSyntax {
    /// `<tool_call>{"name", "arguments"}</tool_call>` for each call, by some models without the tags: Hermes,
    /// Qwen 2.5 and 3, SmolLM3, Granite 4.
    Hermes,
    /// `<tool_call><function=f><parameter=k>v</parameter></function></tool_call>`: Qwen3-Coder, Qwen 3.5.
    QwenXml,
    /// `{"name", "parameters"}` without a tag, or after `<|python_tag|>`: Llama 3.1 to 3.3.
    Llama3,
    /// `[TOOL_CALLS] [{"name", "arguments"}, …]`: Mistral's tokenizers before version 11.
    Mistral,
    /// `[TOOL_CALLS]f{…}` for each call: Mistral's tokenizers since version 11.
    MistralNamed,
    /// `functools[{"name", "arguments"}]` or `<|tool_call|>{…}<|/tool_call|>`: Phi-4-mini.
    Phi4,
    /// `<|tool_call|>[{"name", "arguments"}, …]`: Granite 3.0.
    Granite30,
    /// `<tool_call>[{"name", "arguments"}, …]`: Granite 3.1 to 3.3.
    Granite31,
    /// `<start_function_call>call:f{k:<escape>v<escape>}<end_function_call>`.
    FunctionGemma,
    /// `<|tool_call>call:f{k:<|"|>v<|"|>}<tool_call|>`.
    Gemma4,
}

/// Reasoning in `<think>…</think>` before the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReasoningSyntax {
    /// The template ends with `<think>`, so that the answer begins inside.
    pub opened_by_template: bool,
}

/// Begins reasoning.
pub(super) const THINK: &str = "<think>";
/// Ends reasoning.
pub(super) const END_THINK: &str = "</think>";

impl CallSyntax {
    /// Every family.
    pub const ALL: [Self; 10] = [
        Self::Hermes,
        Self::QwenXml,
        Self::Llama3,
        Self::Mistral,
        Self::MistralNamed,
        Self::Phi4,
        Self::Granite30,
        Self::Granite31,
        Self::FunctionGemma,
        Self::Gemma4,
    ];

    /// The tags of the family. Where one is a special token of the vocabulary, its text must reach the
    /// parser.
    #[must_use]
    pub fn tags(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::QwenXml => &["<tool_call>", "</tool_call>"],
            Self::Llama3 => &["<|python_tag|>"],
            Self::Mistral | Self::MistralNamed => &["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"],
            Self::Phi4 => &["<|tool_call|>", "<|/tool_call|>", "functools"],
            Self::Granite30 | Self::Granite31 => &["<|tool_call|>", "<tool_call>", "</tool_call>"],
            Self::FunctionGemma => &["<start_function_call>", "<end_function_call>", "<escape>"],
            Self::Gemma4 => &["<|tool_call>", "<tool_call|>", "<|\"|>"],
        }
    }

    /// The family of a template; none where it does not read `tools` or shows no known tags.
    fn detect(source: &str) -> Option<Self> {
        let has = |text: &str| source.contains(text);
        if !reads_tools(source) {
            return None;
        }
        let granite = has("<|start_of_role|>");
        if has("<|tool_call>") && has("call:") {
            Some(Self::Gemma4)
        } else if has("<start_function_call>") {
            Some(Self::FunctionGemma)
        } else if has("<function=") && has("<parameter=") && has("<tool_call>") {
            Some(Self::QwenXml)
        } else if has("[TOOL_CALLS]") {
            Some(if prints_names(source) { Self::MistralNamed } else { Self::Mistral })
        } else if has("functools[") || has("<|/tool_call|>") || has("<|/tool|>") {
            Some(Self::Phi4)
        } else if has("<|tool_call|>") {
            granite.then_some(Self::Granite30)
        } else if has("<tool_call>") {
            Some(if granite && !has("</tool_call>") { Self::Granite31 } else { Self::Hermes })
        } else if has("<|python_tag|>") || has(r#"{"name": function name, "parameters""#) {
            Some(Self::Llama3)
        } else {
            None
        }
    }
}

impl AnswerSyntax {
    /// Reads it from the source of a chat template and from the prompt that the template rendered.
    #[must_use]
    pub fn detect(template_source: &str, rendered_prompt: &str) -> Self {
        let opened_by_template = rendered_prompt.trim_end().ends_with(THINK);
        let reasons = opened_by_template || template_source.contains(END_THINK);
        Self {
            calls: CallSyntax::detect(template_source),
            reasoning: reasons.then_some(ReasoningSyntax { opened_by_template }),
        }
    }

    /// All tags that the parser of this syntax looks for. Where one is a special token of the vocabulary, its
    /// text must stand in the tokens of the answer.
    #[must_use]
    pub fn tags(&self) -> Vec<&'static str> {
        let calls = self.calls.map(CallSyntax::tags).unwrap_or_default();
        let reasoning: &[&str] = if self.reasoning.is_some() { &[THINK, END_THINK] } else { &[] };
        [calls, reasoning].concat()
    }
}

/// Whether a template reads the variable `tools`, and not only an attribute or a text of this name.
fn reads_tools(source: &str) -> bool {
    source.match_indices("tools").any(|(at, word)| {
        let (before, after) = (&source[..at], &source[at + word.len()..]);
        let follows = ["if ", "in ", "and ", "or ", "not ", "("].iter().any(|word| before.ends_with(word));
        let leads = after.starts_with(" is ") || after.trim_start().starts_with('|');
        let whole = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && !"_.'\"".contains(c));
        (follows || leads) && whole(before.chars().next_back()) && whole(after.chars().next())
    })
}

/// Whether a template of Mistral prints the name of a function right after the tag, and no JSON.
fn prints_names(source: &str) -> bool {
    if source.contains("[ARGS]") || source.contains("[CALL_ID]") {
        return true;
    }
    source.match_indices("[TOOL_CALLS]").any(|(at, tag)| {
        let rest =
            source[at + tag.len()..].trim_start_matches(['\'', '"', ' ', '+', '~', '}', '{', '-', '\n']);
        let expression: String =
            rest.chars().take_while(|c| c.is_alphanumeric() || "_.[]'\"".contains(*c)).collect();
        expression.trim_end_matches(['\'', '"', ']']).ends_with("name")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Short templates with the lines of real ones by which a family is known.
    const TEMPLATES: &[(&str, Option<CallSyntax>)] = &[
        // Qwen 2.5 and 3, Hermes, SmolLM3.
        (
            "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n<tool_call>\n\
             {\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>{% endif %}",
            Some(CallSyntax::Hermes),
        ),
        ("{%- if xml_tools or tools -%}<tool_call></tool_call>{% endif %}", Some(CallSyntax::Hermes)),
        // Granite 4.
        (
            "<|start_of_role|>{% if tools is defined %}<tool_call>\n{\"name\": f}\n</tool_call>{% endif %}",
            Some(CallSyntax::Hermes),
        ),
        // Qwen3-Coder.
        (
            "{%- if tools %}<tool_call>\n<function=example>\n<parameter=p>\nv\n</parameter></function></tool_call>\
             {% endif %}",
            Some(CallSyntax::QwenXml),
        ),
        // Llama 3.1 and 3.2.
        (
            "{%- if tools is not none %}{{- 'Respond in the format {\"name\": function name, \"parameters\": \
             dictionary of argument name and its value}.' }}{% endif %}{{- \"<|python_tag|>\" }}",
            Some(CallSyntax::Llama3),
        ),
        (
            "{%- if not tools is defined %}{% set tools = none %}{% endif %}{\"name\": function name, \
             \"parameters\": dictionary}",
            Some(CallSyntax::Llama3),
        ),
        // Mistral 7B v0.3 and Small 3.1; the templates of Ministral 3 and of tokenizer 11.
        ("{%- if tools is not none %}{% endif %}{{- \"[TOOL_CALLS] [\" }}", Some(CallSyntax::Mistral)),
        (
            "{% if tools %}{% endif %}{{ '[TOOL_CALLS]' + message['content']|string }}",
            Some(CallSyntax::Mistral),
        ),
        (
            "{% for tool in tools %}{% endfor %}{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + a }}",
            Some(CallSyntax::MistralNamed),
        ),
        (
            "{% for tool in tools %}{% endfor %}{{- \"[TOOL_CALLS]\" + call.function.name }}{{- a }}",
            Some(CallSyntax::MistralNamed),
        ),
        // Phi-4-mini, as it comes with llama.cpp, and with its calls in Python's words.
        (
            "{%- if tools is defined -%}<|tool_call|>{\"name\": \"foo\"}<|/tool_call|>{% endif %}",
            Some(CallSyntax::Phi4),
        ),
        ("{% if tools %}functools[{\"name\": f}]{% endif %}", Some(CallSyntax::Phi4)),
        // Granite 3.0 and 3.1.
        ("<|start_of_role|>{% if tools %}<|tool_call|>{% endif %}", Some(CallSyntax::Granite30)),
        ("<|start_of_role|>{% if tools %}<tool_call> and a list{% endif %}", Some(CallSyntax::Granite31)),
        // FunctionGemma and Gemma 4.
        (
            "{% for tool in tools %}{% endfor %}<start_function_call>call:f{k:<escape>v<escape>}",
            Some(CallSyntax::FunctionGemma),
        ),
        (
            "{%- if tools -%}{% endif %}{{- '<|tool_call>call:' + function['name'] + '{' -}}",
            Some(CallSyntax::Gemma4),
        ),
        // Without tools: ChatML, a text that speaks of tools, tools in a message only.
        ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", None),
        ("You have tools. <tool_call></tool_call>", None),
        ("{% if 'tools' in message and message['tools'] %}<|tool|><|/tool|>{% endif %}", None),
        ("{% if message.tools %}<tool_call></tool_call>{% endif %}", None),
        // Tools in a family that is not built here.
        ("{% if tools %}<TOOLCALL>[{\"name\": f}]</TOOLCALL>{% endif %}", None),
    ];

    #[test]
    fn a_template_tells_its_family() {
        for (source, expected) in TEMPLATES {
            assert_eq!(AnswerSyntax::detect(source, "").calls, *expected, "{source}");
        }
        let known: Vec<_> = TEMPLATES.iter().filter_map(|(_, syntax)| *syntax).collect();
        assert!(CallSyntax::ALL.iter().all(|syntax| known.contains(syntax)));
    }

    #[test]
    fn reasoning_is_known_from_the_template_and_the_prompt() {
        let reasoning = |source, prompt| AnswerSyntax::detect(source, prompt).reasoning;
        let opened = |opened_by_template| Some(ReasoningSyntax { opened_by_template });
        let source = "{{ content.split('</think>') }}";
        assert_eq!(reasoning("{{ content }}", "<|im_start|>assistant\n"), None);
        assert_eq!(reasoning(source, "<|im_start|>assistant\n"), opened(false));
        assert_eq!(reasoning(source, "<|im_start|>assistant\n<think>\n"), opened(true));
        assert_eq!(reasoning(source, "<think>\n\n</think>\n\n"), opened(false));
        assert_eq!(reasoning("{{ '<think>' }}", "assistant <think>"), opened(true));
    }

    #[test]
    fn the_tags_of_an_answer_are_those_of_calls_and_reasoning() {
        let syntax = AnswerSyntax {
            calls: Some(CallSyntax::Hermes),
            reasoning: Some(ReasoningSyntax { opened_by_template: false }),
        };
        assert_eq!(syntax.tags(), ["<tool_call>", "</tool_call>", "<think>", "</think>"]);
        assert_eq!(AnswerSyntax::default().tags(), Vec::<&str>::new());
    }
}
