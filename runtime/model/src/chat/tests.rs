//! Templates compared with the texts of transformers, and templates that fail.

use super::*;
use serde_json::{Map, Value as Json, json};
use std::time::{Duration, UNIX_EPOCH};

/// Tuesday, 3 February 2026, 14:05:06 UTC: the clock of the recipe.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_770_127_506)
}

fn special() -> SpecialTokens {
    let token = |text: &str| Some(text.to_owned());
    SpecialTokens {
        bos_token: token("<s>"),
        eos_token: token("</s>"),
        unk_token: token("<unk>"),
        pad_token: token("<pad>"),
    }
}

/// Renders a conversation as the recipe describes it: `messages`, and perhaps `tools` and variables.
fn render(template: &str, conversation: &Json) -> Result<String, ChatError> {
    let list = |key: &str| conversation[key].as_array().cloned().unwrap_or_default();
    let known = ["messages", "tools", "add_generation_prompt"];
    let all = conversation.as_object().unwrap().clone();
    let variables: Map<String, Json> =
        all.into_iter().filter(|(key, _)| !known.contains(&key.as_str())).collect();
    ChatTemplate::new(template, special())?.render(&ChatRequest {
        messages: &list("messages"),
        tools: &list("tools"),
        add_generation_prompt: conversation["add_generation_prompt"].as_bool().unwrap_or(true),
        variables: &variables,
        now: now(),
    })
}

#[test]
fn texts_equal_those_of_transformers() {
    let reference: Json = serde_json::from_str(include_str!("reference.json")).unwrap();
    let (mut compared, mut differences) = (0, Vec::new());
    for template in reference["templates"].as_array().unwrap() {
        for (name, wanted) in template["texts"].as_object().unwrap() {
            let rendered = render(template["template"].as_str().unwrap(), &reference["conversations"][name]);
            let place = format!("{} with {name}", template["name"]);
            match (rendered, wanted["error"].as_str()) {
                (Ok(text), None) if text == wanted["text"].as_str().unwrap() => {}
                (Err(ChatError::Refused(why)), Some("refused")) if why == wanted["why"] => {}
                (Err(ChatError::Template(_)), Some("template")) => {}
                (Err(ChatError::Failed(_)), Some("failed")) => {}
                (rendered, _) => differences.push(format!("{place}: {rendered:?} instead of {wanted}")),
            }
            compared += 1;
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(compared, 20 * 11, "conversations and templates");
}

#[test]
fn conversations_with_tools_take_the_template_of_that_name() {
    let messages = [json!({"role": "user", "content": "hi"})];
    let text = |template: &ChatTemplate, tools: &[Json]| {
        template.render(&ChatRequest {
            messages: &messages,
            tools,
            add_generation_prompt: true,
            variables: &Map::new(),
            now: now(),
        })
    };
    let plain = || ChatTemplate::new("plain {{ tools }}", special()).unwrap();
    let tool = [json!({"type": "function"})];
    let both = plain().with_tools("tools {{ tools | length }}");
    assert_eq!(text(&both, &[]).unwrap(), "plain None");
    assert_eq!(text(&both, &tool).unwrap(), "tools 1");
    let broken = plain().with_tools("{% for");
    assert_eq!(text(&broken, &[]).unwrap(), "plain None");
    assert!(matches!(text(&broken, &tool), Err(ChatError::Template(_))));
}

fn one(template: &str) -> Result<String, ChatError> {
    render(template, &json!({"messages": [{"role": "user", "content": "hi"}]}))
}

#[test]
fn work_is_bounded() {
    let endless = "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}";
    let error = one(endless).unwrap_err();
    assert!(matches!(&error, ChatError::Failed(why) if why.contains("fuel")), "{error}");
    let deep = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(matches!(one(deep), Err(ChatError::Failed(_))));
    let large = "{{ 'x' * 100000000 }}{{ 'y' * 100000000 }}";
    assert!(one(large).is_err());
    let long = "x".repeat(MAX_BYTES + 1);
    assert!(matches!(one(&long), Err(ChatError::Template(why)) if why.contains("more than 131072")));
}

#[test]
fn requests_cannot_replace_messages() {
    let variables = json!({"messages": [], "bos_token": "x", "mine": 3});
    let text = ChatTemplate::new("{{ messages | length }}{{ bos_token }}{{ mine }}", special())
        .unwrap()
        .render(&ChatRequest {
            messages: &[json!({"role": "user", "content": "hi"})],
            tools: &[],
            add_generation_prompt: true,
            variables: variables.as_object().unwrap(),
            now: now(),
        });
    assert_eq!(text.unwrap(), "1<s>3");
    assert!(one("{% include 'other' %}").is_err());
    assert!(one("{{ strftime_now('%!') }}").is_err());
    assert!(one("{{ absent | tojson }}").is_err());
}

/// Values that nest as deep as the bound on work allows, by every way that templates have.
#[test]
fn deep_values_never_overflow_the_stack() {
    let straight = "{% set x = [x] %}".repeat(7000);
    let literals = format!("{{% set x = {}x{} %}}", "[".repeat(70), "]".repeat(70)).repeat(700);
    let map = "{% set x = {'a': x} %}".repeat(5000);
    let uses = [
        "x",
        "x == [x]",
        "x ~ 'a'",
        "x | tojson",
        "x | string | length",
        "[x, [x]] | sort",
        "x in [[x]]",
        "x | length",
    ];
    for build in [&straight, &literals, &map] {
        for used in uses {
            let _rendered_or_failed = one(&format!("{build}{{{{ {used} }}}}"));
        }
    }
    // Each call nests the value 49,000 levels deeper, until the bound on work ends it.
    for calls in [1, 3, 5, 6, 7, 40] {
        for used in uses {
            let call = format!("{{% if n %}}{{{{ f(x, n - 1) }}}}{{% else %}}{{{{ {used} }}}}{{% endif %}}");
            let template =
                format!("{{% macro f(x, n) %}}{literals}{call}{{% endmacro %}}{{{{ f([], {calls}) }}}}");
            let _rendered_or_failed = one(&template);
        }
    }
}

#[test]
fn namespaces_hold_no_deep_values_and_no_cycles() {
    let failed = |template: &str| match one(template) {
        Err(ChatError::Failed(why)) => why,
        other => panic!("{other:?}"),
    };
    let grow = |value: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range(90000) %}}{{% set ns.x = {value} %}}{{% endfor %}}"
        )
    };
    for value in ["[ns.x]", "{'a': ns.x}", "(ns.x,)", "dict(a=ns.x)", "[[ns.x, 1]]", "[ns.x] | list"] {
        let why = failed(&grow(value));
        assert!(why.contains("nests too deep"), "{value}: {why}");
    }
    for value in ["ns", "[ns]", "namespace(x=ns)", "range"] {
        let why = failed(&grow(value));
        assert!(why.contains("only plain data"), "{value}: {why}");
    }
    let doubled =
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    assert!(failed(doubled).contains("too large"));
    let doubled = format!("{}{{{{ x | tojson }}}}", "{% set x = [x, x] %}".repeat(40));
    assert!(failed(&doubled).contains("too large"));
}

#[test]
fn namespaces_work_as_in_jinja() {
    let template = "{% set ns = namespace(n=1, found=false) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}\
                    {%- set ns.found = 'x' in 'axb' -%}{% endfor %}{{ ns.n }} {{ 'y' if ns.found else 'n' }} {{ 'y' if ns.absent is defined else 'n' }}\
                    {% set ns.text %}a{{ ns.n }}{% endset %}{{ ns.text }}{% set ns.pair = 1, 2 %}{{ ns.pair[1] }}";
    assert_eq!(one(template).unwrap(), "2 y na22");
}

#[test]
fn long_chains_compile_or_are_refused() {
    let chain = |start: &str, link: &str, end: &str, bytes: usize| {
        format!("{{{{ {start}{}{end} }}}}", link.repeat((bytes - 10) / link.len()))
    };
    let links = [
        ("1", "+1"),
        ("a", ".b"),
        ("a", "|e"),
        ("a", "[0]"),
        ("a", "()"),
        ("1", " if 1 else 1"),
        ("1", "~1"),
    ];
    for (start, link) in links {
        let _rendered_or_failed = one(&chain(start, link, "", MAX_TAG_BYTES));
        let error = one(&chain(start, link, "", MAX_BYTES)).unwrap_err();
        assert!(matches!(&error, ChatError::Template(why) if why.contains("it has a tag of")), "{error}");
    }
    for link in ["-", "not ", "(", "[", "{1:"] {
        let _rendered_or_failed = one(&chain("", link, "1", MAX_TAG_BYTES));
    }
    for tag in
        ["{%elif a%}", "{% if a %}", "{% for a in b %}", "{% macro a() %}", "{% set a %}", "{% set a.b %}"]
    {
        let count = MAX_BYTES / tag.len() - 10;
        let _rendered_or_failed = one(&format!("{{% if a %}}{}{{% endif %}}", tag.repeat(count)));
    }
}

#[test]
fn refusals_of_templates_are_bounded() {
    let error = one("{{ raise_exception('x' * 100000) }}").unwrap_err();
    assert!(matches!(error, ChatError::Refused(why) if why.len() == MAX_REFUSAL_CHARS));
}
