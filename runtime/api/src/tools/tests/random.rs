//! Random answers: how they are cut changes nothing, no text is lost, nothing panics.

use super::*;
use proptest::prelude::*;

/// Pieces of text that make calls, and half of them, likely.
fn fragment() -> impl Strategy<Value = String> {
    let fixed = [
        "<tool_call>",
        "</tool_call>",
        "<|tool_call|>",
        "<|/tool_call|>",
        "<|tool_call>",
        "<tool_call|>",
        "functools[",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<start_function_call>",
        "<end_function_call>",
        "<escape>",
        "<|\"|>",
        "<function=refresh>",
        "<function=get_weather>",
        "</function>",
        "<parameter=city>",
        "<parameter=limit>",
        "</parameter>",
        "call:refresh{",
        "call:get_weather{city:",
        "refresh",
        "{}",
        "[",
        "]",
        "{",
        "}",
        "{\"name\": \"refresh\", ",
        "\"arguments\": {}",
        "\"parameters\": {\"a\": ",
        "{\"name\": \"other\"",
        "\"",
        ",",
        ":",
        ";",
        " ",
        "\n",
        "<",
        "<tool",
        "[TOOL",
        "func",
        "a",
        "7",
        "\u{e9}",
        "\\",
        "null",
        "<think>",
        "</think>",
    ];
    let calls: Vec<String> = CallSyntax::ALL.into_iter().map(|syntax| one_call_of(syntax).0).collect();
    let fixed: Vec<String> = fixed.into_iter().map(str::to_owned).collect();
    prop_oneof![4 => prop::sample::select(fixed), 1 => prop::sample::select(calls), 1 => "\\PC{0,4}"]
}

/// A text at these places, as far as they are boundaries.
fn cut<'a>(text: &'a str, places: &[usize]) -> Vec<&'a str> {
    let mut ends: Vec<usize> = places.iter().map(|at| at % (text.len() + 1)).collect();
    ends.retain(|at| text.is_char_boundary(*at));
    ends.extend([0, text.len()]);
    ends.sort_unstable();
    ends.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn it_does_not_matter_how_an_answer_is_cut(
        fragments in prop::collection::vec(fragment(), 0..12),
        places in prop::collection::vec(any::<usize>(), 0..12),
        thinks: bool, opened_by_template: bool, whole: bool, one: bool,
    ) {
        let text = fragments.concat();
        for calls in CallSyntax::ALL {
            let reasoning = thinks.then_some(ReasoningSyntax { opened_by_template });
            let syntax = AnswerSyntax { calls: Some(calls), reasoning };
            let parser = || {
                let parser = AnswerParser::new(syntax, &tools(), &ToolChoice::Auto);
                let parser = if whole { parser.whole_calls() } else { parser };
                if one { parser.one_call() } else { parser }
            };
            let (mut in_one, mut in_pieces, mut by_char) = (parser(), parser(), parser());
            let expected = found_by(&mut in_one, [text.as_str()]);
            prop_assert_eq!(&found_by(&mut in_pieces, cut(&text, &places)), &expected, "{:?} {:?}", calls, text);
            prop_assert_eq!(&found_by(&mut by_char, pieces(&text, 1)), &expected, "{:?} {:?}", calls, text);
            prop_assert_eq!(in_one.cut_call(), by_char.cut_call());
            for found in &expected {
                if let (Found::Call(_, arguments), true) = (found, whole) {
                    let object = serde_json::from_str::<serde_json::Map<String, Value>>(arguments);
                    prop_assert!(object.is_ok(), "{arguments} {text:?}");
                }
            }
        }
    }

    #[test]
    fn no_text_is_lost_where_no_tag_is_whole(
        fragments in prop::collection::vec(fragment(), 0..12), chars in 1usize..6,
    ) {
        let text = fragments.concat();
        for syntax in CallSyntax::ALL {
            let others = ["functools", "<function=", "\"refresh\"", "get_weather"];
            if syntax.tags().iter().chain(&others).any(|tag| text.contains(tag)) {
                continue;
            }
            let expected: Vec<Found> = Some(content(&text)).filter(|_| !text.is_empty()).into_iter().collect();
            prop_assert_eq!(found_by(&mut parser(syntax), pieces(&text, chars)), expected, "{:?}", syntax);
        }
    }

    #[test]
    fn no_character_is_lost_around_complete_calls(
        before in "[a-z <{\\[]{0,8}[a-z]", between in "[a-z]{1,8}", after in "[a-z][a-z >}\\]]{0,8}",
    ) {
        for syntax in CallSyntax::ALL {
            let (text, _) = one_call_of(syntax);
            let answer = format!("{before} {text}\n{between}\n{text} {after}");
            let found = found_by(&mut parser(syntax), pieces(&answer, 3));
            let rome = call("get_weather", r#"{"city": "Rome"}"#);
            let expected = [content(&before), rome.clone(), content(&between), rome, content(&after)];
            prop_assert_eq!(found, expected, "{:?} {:?}", syntax, answer);
        }
    }

    #[test]
    fn random_texts_are_taken_whole(text in any::<String>(), places in prop::collection::vec(any::<usize>(), 0..8)) {
        for syntax in CallSyntax::ALL {
            let found = found_by(&mut parser(syntax), cut(&text, &places));
            prop_assert!(found.iter().all(|found| matches!(found, Found::Content(_))));
        }
    }
}
