//! Examples of every family.

use super::*;

#[test]
fn hermes() {
    let (paris, oslo) = (r#"{"city": "Paris"}"#, r#"{"city": "Oslo"}"#);
    let one = |arguments: &str| {
        format!("<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {arguments}}}\n</tool_call>")
    };
    let bare = |arguments: &str| format!("{{\"name\": \"get_weather\", \"arguments\": {arguments}}}");
    let weather = |arguments| call("get_weather", arguments);
    for (text, expected) in [
        (one(paris), vec![weather(paris)]),
        (one("{}"), vec![weather("{}")]),
        (format!("{}\n{}", one(paris), one(oslo)), vec![weather(paris), weather(oslo)]),
        (format!("Let me look. \n\n{} ", one(paris)), vec![content("Let me look."), weather(paris)]),
        (
            format!("a {}\n b \n{}\nc ", one(paris), one(oslo)),
            vec![content("a"), weather(paris), content("b"), weather(oslo), content("c ")],
        ),
        // No end tag, no space, two calls in one pair of tags.
        (one(paris).replace("\n</tool_call>", ""), vec![weather(paris)]),
        (one(paris).replace("}}\n</tool_call>", "}}\n</tool_"), vec![weather(paris)]),
        (one(paris).replace('\n', ""), vec![weather(paris)]),
        (
            format!(
                "{}\n{}",
                one(paris).replace("\n</tool_call>", ""),
                one(oslo).replace("<tool_call>\n", "")
            ),
            vec![weather(paris), weather(oslo)],
        ),
        // The last brace is missing.
        (one(paris).replace("}}", "}"), vec![weather(paris)]),
        // Without tags, and JSON that is no call.
        (bare(paris), vec![weather(paris)]),
        (format!("{}\n{}", bare(paris), bare(oslo)), vec![weather(paris), weather(oslo)]),
        (format!("{{\"a\": {}}}", bare(paris)), vec![content(&format!("{{\"a\": {}}}", bare(paris)))]),
        (bare(paris).replace("get_", "set_"), vec![content(&bare(paris).replace("get_", "set_"))]),
        // Other members, other orders, arguments as a text, none at all.
        (
            r#"<tool_call>{"id": 7, "arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>"#
                .to_owned(),
            vec![weather(paris)],
        ),
        (
            r#"<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}</tool_call>"#
                .to_owned(),
            vec![weather(paris)],
        ),
        (r#"<tool_call>{"name": "refresh"}</tool_call>"#.to_owned(), vec![call("refresh", "{}")]),
        (one("null"), vec![weather("{}")]),
        (one("\"\""), vec![weather("{}")]),
        // A line end in a string, which JSON must escape.
        (one("{\"city\": \"a\nb\"}"), vec![weather("{\"city\": \"a\\nb\"}")]),
        (one(r#"{"city": "</tool_call> \"}{ é"}"#), vec![weather(r#"{"city": "</tool_call> \"}{ é"}"#)]),
    ] {
        check(CallSyntax::Hermes, &text, &expected);
    }
}

#[test]
fn qwen_xml() {
    let dallas = "<function=get_weather>\n<parameter=city>\nDallas\n</parameter>\n<parameter=state>\nTX\n</parameter>\
                  \n</function>";
    let tagged = format!("<tool_call>\n{dallas}\n</tool_call>");
    let weather = || call("get_weather", r#"{"city": "Dallas", "state": "TX"}"#);
    let area = "<tool_call>\n<function=calculate_area>\n<parameter=shape>\nrectangle\n</parameter>\n\
                <parameter=dimensions>\n{\"width\": 10, \n \"height\": 20}\n</parameter>\n<parameter=precision>\n2\n\
                </parameter>\n</function>\n</tool_call>";
    let dimensions =
        "{\"shape\": \"rectangle\", \"dimensions\": {\"width\": 10, \n \"height\": 20}, \"precision\": 2}";
    let value = |parameter: &str, value: &str| {
        format!(
            "<tool_call><function=get_weather><parameter={parameter}>{value}</parameter></function></tool_call>"
        )
    };
    for (text, expected) in [
        (tagged.clone(), vec![weather()]),
        (format!("Sure!{tagged}\n{tagged}"), vec![content("Sure!"), weather(), weather()]),
        (dallas.to_owned(), vec![weather()]),
        (format!("<tool_call>\n{dallas}"), vec![weather()]),
        (area.to_owned(), vec![call("calculate_area", dimensions)]),
        (value("limit", "7"), vec![call("get_weather", r#"{"limit": 7}"#)]),
        (value("limit", "null"), vec![call("get_weather", r#"{"limit": null}"#)]),
        (value("limit", "some"), vec![call("get_weather", r#"{"limit": "some"}"#)]),
        (
            value("city", "\n\n  <b>\"é\"</b>\n\n"),
            vec![call("get_weather", r#"{"city": "\n  <b>\"é\"</b>\n"}"#)],
        ),
        (value("other", "1"), vec![call("get_weather", r#"{"other": "1"}"#)]),
        ("<tool_call><function=refresh></function></tool_call>".to_owned(), vec![call("refresh", "{}")]),
    ] {
        check(CallSyntax::QwenXml, &text, &expected);
    }
}

#[test]
fn llama() {
    let weather = |arguments| call("get_weather", arguments);
    let (one, two) = (r#"{"name": "get_weather", "parameters": {"city": "a"}}"#, r#"{"city": "a"}"#);
    let refresh = r#"{"name": "refresh", "arguments": {}}"#;
    for (text, expected) in [
        (one.to_owned(), vec![weather(two)]),
        (format!("<|python_tag|>{one}"), vec![weather(two)]),
        (format!("{one}; {refresh} ;{one}"), vec![weather(two), call("refresh", "{}"), weather(two)]),
        (format!("{one}\n{refresh}"), vec![weather(two), call("refresh", "{}")]),
        (format!("<|python_tag|>{one};<|python_tag|>{refresh}"), vec![weather(two), call("refresh", "{}")]),
        (format!("{one};"), vec![weather(two)]),
        (
            format!("Here {{it}} is: {one} Would you like {{more}}?"),
            vec![content("Here {it} is:"), weather(two), content("Would you like {more}?")],
        ),
        (format!("{one}; and {{}}"), vec![weather(two), content("; and {}")]),
        (
            format!("{one} I passed {{\"city\": \"a\"}}; {one}"),
            vec![weather(two), content("I passed {\"city\": \"a\"};"), weather(two)],
        ),
        (
            r#"{"type": "function", "name": "get_weather", "parameters": {"city": "{a} [b] \"c\""}}"#
                .to_owned(),
            vec![weather(r#"{"city": "{a} [b] \"c\""}"#)],
        ),
    ] {
        check(CallSyntax::Llama3, &text, &expected);
    }
    for text in [
        r#"{"name": "get_weather"}"#,
        r#"{"parameters": {}}"#,
        r#"{"name": "other", "parameters": {}}"#,
        r#"{"name": "other", "parameters": {"name": "refresh", "parameters": {}}}"#,
        r#"{"calls": [{"name": "refresh", "parameters": {}}]} "#,
        r#"{"name": "refresh", "parameters": [1]}"#,
        r#"{"name": 7, "parameters": {}}"#,
        "fn main() { println!(\"{}\", 1); }\n",
        "<|python_tag|>print(1)",
        "{\"na",
        "{{",
    ] {
        check(CallSyntax::Llama3, text, &[content(text)]);
    }
}

#[test]
fn mistral() {
    let weather = |arguments| call("get_weather", arguments);
    let dallas = r#"{"city": "Dallas", "state": "TX"}"#;
    for (text, expected) in [
        (
            format!("[TOOL_CALLS][{{\"name\": \"get_weather\", \"arguments\":{dallas}}}]"),
            vec![weather(dallas)],
        ),
        (
            format!("[TOOL_CALLS] [{{\"arguments\":{dallas}, \"name\": \"get_weather\"}}]"),
            vec![weather(dallas)],
        ),
        (
            r#"[TOOL_CALLS] [{"arguments":{"name": "refresh"}, "name": "get_weather"}]"#.to_owned(),
            vec![weather(r#"{"name": "refresh"}"#)],
        ),
        (
            format!(
                "Hello[TOOL_CALLS] [{{\"name\": \"get_weather\", \"arguments\": {dallas}}}, \
                 {{\"name\": \"get-time\", \"arguments\": {{}}, \"id\": \"abcdefghi\"}}]\nextra data"
            ),
            vec![content("Hello"), weather(dallas), call("get-time", "{}"), content("extra data")],
        ),
        // The end of the list is missing.
        (
            format!("[TOOL_CALLS] [{{\"name\": \"get_weather\", \"arguments\": {dallas}}}"),
            vec![weather(dallas)],
        ),
        (
            format!("[TOOL_CALLS]get_weather{dallas}[TOOL_CALLS]refresh{{}}"),
            vec![weather(dallas), call("refresh", "{}")],
        ),
        (format!("Hi [TOOL_CALLS]get_weather[ARGS]{dallas}"), vec![content("Hi"), weather(dallas)]),
        (format!("[TOOL_CALLS]get-time[CALL_ID]abc123XYZ[ARGS]{dallas}"), vec![call("get-time", dallas)]),
    ] {
        check(CallSyntax::Mistral, &text, &expected);
        check(CallSyntax::MistralNamed, &text, &expected);
    }
    for text in [
        "[TOOL_CALLS] not json at all",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS]other{}",
        "[TOOL_CAL",
        "[TOOL_CALLS]refresh now",
    ] {
        check(CallSyntax::Mistral, text, &[content(text)]);
    }
}

#[test]
fn phi() {
    let (tokyo, zone) = (r#"{"city": "Tokyo"}"#, r#"{"timezone": "Asia/Tokyo"}"#);
    let weather = || call("get_weather", tokyo);
    let object = format!("{{\"name\": \"get_weather\", \"arguments\": {tokyo}}}");
    for (text, expected) in [
        (format!("functools[{object}]"), vec![weather()]),
        (
            format!("functools[\n  {object},\n  {{\"name\": \"get-time\", \"arguments\": {zone}}}\n]"),
            vec![weather(), call("get-time", zone)],
        ),
        (
            format!("Let me check.\nfunctools[{object}]\nMore?"),
            vec![content("Let me check."), weather(), content("More?")],
        ),
        (format!("<|tool_call|>{object}<|/tool_call|>"), vec![weather()]),
        (format!("<|tool_call|>[{object}]<|/tool_call|>"), vec![weather()]),
    ] {
        check(CallSyntax::Phi4, &text, &expected);
    }
    for text in [
        "functools[] This is just text",
        "functools[ This is just text ]",
        "import functools\nfunctools.reduce",
        r#"functools[{"name": "get_weather", "arguments": [1]}]"#,
        r#"functools[{"name": "other", "arguments": {}}]"#,
        "func",
    ] {
        check(CallSyntax::Phi4, text, &[content(text)]);
    }
}

#[test]
fn granite() {
    let (tokyo, zone) = (r#"{"city": "Tokyo"}"#, r#"{"timezone": "Asia/Tokyo"}"#);
    let weather = || call("get_weather", tokyo);
    for syntax in [CallSyntax::Granite30, CallSyntax::Granite31] {
        for tag in ["<|tool_call|>", "<|tool_call|> ", "<tool_call> ", "<tool_call>"] {
            let list = format!(
                "{tag}[\n  {{\"arguments\": {tokyo}, \"name\": \"get_weather\"}},\n  \
                 {{\"arguments\": {zone}, \"name\": \"get-time\"}}\n]"
            );
            check(syntax, &list, &[weather(), call("get-time", zone)]);
            let text = format!("One moment.\n{list}\nThat is it.");
            check(
                syntax,
                &text,
                &[content("One moment."), weather(), call("get-time", zone), content("That is it.")],
            );
            let undefined = format!("{tag}[{{\"name\": \"other\", \"arguments\": {{}}}}]");
            check(syntax, &undefined, &[content(&undefined)]);
        }
    }
}

#[test]
fn gemma() {
    for (syntax, open, mark, close) in [
        (CallSyntax::FunctionGemma, "<start_function_call>", "<escape>", "<end_function_call>"),
        (CallSyntax::Gemma4, "<|tool_call>", "<|\"|>", "<tool_call|>"),
    ] {
        let text = |template: &str| template.replace("<(", open).replace(")>", close).replace('\'', mark);
        let weather = |arguments| call("get_weather", arguments);
        for (template, expected) in [
            ("<(call:get_weather{city:'London'})>", vec![weather(r#"{"city": "London"}"#)]),
            (
                "<(call:get_weather{city:'San Francisco, CA',limit:42})>",
                vec![weather(r#"{"city": "San Francisco, CA", "limit": 42}"#)],
            ),
            (
                "Let me check. <(call:get_weather{city:'}\"{'})><(call:refresh{})>\nDone",
                vec![
                    content("Let me check."),
                    weather(r#"{"city": "}\"{"}"#),
                    call("refresh", "{}"),
                    content("Done"),
                ],
            ),
            // A number between marks, for a parameter that is a number.
            ("<(call:get_weather{limit:'10'})>", vec![weather(r#"{"limit": 10}"#)]),
            // Values without marks, a missing comma, spaces, no end tag.
            (
                "<(call:get_weather{ city: London , limit: null, x:'a'y:true}",
                vec![weather(r#"{"city": "London", "limit": null, "x": "a", "y": true}"#)],
            ),
            (
                "<(call:calculate_area{dimensions:{a:1.5,'b c':[1,'two',{}],d:[]},shape:''})>",
                vec![call(
                    "calculate_area",
                    r#"{"dimensions": {"a": 1.5, "b c": [1, "two", {}], "d": []}, "shape": ""}"#,
                )],
            ),
            ("<(call:get-time{})>", vec![call("get-time", "{}")]),
        ] {
            check(syntax, &text(template), &expected);
        }
        for template in ["<(call:other{})>", "<( nothing", "<(call:refresh now", "<(call:refresh{])>", "a <"]
        {
            let text = text(template);
            check(syntax, &text, &[content(&text)]);
        }
    }
}
