//! The rules of the house that a machine can hold: layers, homes of the dangerous things, files that say what they are, and
//! settings that are documented.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use forebay::config::SETTINGS;

/// Bottom to top. A module may import from layers below its own, and from the ground within its own layer if it is ground.
const GROUND: &[&str] = &[
    "error",
    "order",
    "outage",
    "shedding",
    "units",
    "upload",
    "timetable",
    "allowance",
    "forecast",
    "status",
    "config",
    "crash_points",
];
/// What leaves, and how fast. The bucket stands on it, so that nothing leaves past it.
const BUDGET: &[&str] = &["pacer"];
const RESOURCES: &[&str] = &["http", "spool", "queue", "bucket", "embedded_s3", "ledger", "telemetry"];
const ROLES: &[&str] = &["ingest", "drain", "keeper", "console", "fleet", "audit"];
const WIRING: &[&str] = &["commands"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_below(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Each source file with its path below `src/` and its text without unit tests.
fn sources() -> Vec<(String, String)> {
    files_below(&root().join("src"), "rs")
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap().to_owned();
            (path.strip_prefix(root().join("src")).unwrap().display().to_string(), code)
        })
        .collect()
}

fn module_of(path: &str) -> &str {
    path.split('/').next().unwrap().trim_end_matches(".rs")
}

#[test]
fn a_module_imports_only_from_the_layers_below_its_own() {
    let layers = [GROUND, BUDGET, RESOURCES, ROLES, WIRING];
    let layer_of = |module: &str| layers.iter().position(|layer| layer.contains(&module));
    let mut wrong = Vec::new();
    for (path, code) in sources() {
        let module = module_of(&path);
        if module == "lib" || module == "main" {
            continue;
        }
        let layer = layer_of(module).unwrap_or_else(|| panic!("src/{path} is in no layer; see tests/tidy.rs"));
        for import in code.split("crate::").skip(1) {
            let imported: String = import.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            let Some(from) = layer_of(&imported) else { continue };
            let sideways = from == layer && imported != module && layer != 0;
            if from > layer || sideways {
                wrong.push(format!("src/{path} imports {imported}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn dangerous_things_have_one_home() {
    let homes: &[(&str, &[&str])] = &[
        ("std::env::var", &["config.rs", "config/settings.rs"]),
        ("env::vars", &["config/settings.rs"]),
        ("sqlx::", &["queue/"]),
        ("aws_sdk_s3", &["bucket/"]),
        ("aws_config", &["bucket/"]),
        ("aws_smithy", &["bucket/"]),
        ("aws_sigv4", &["bucket/"]),
        ("governor::", &["pacer/"]),
        ("unsafe {", &["pacer/tcp.rs", "http/gathering.rs", "spool/buffer.rs"]),
        ("sync_all", &["spool.rs"]),
        ("sync_data", &["spool.rs"]),
        ("join(\"spool\")", &["spool.rs"]),
        ("StatusCode", &["http/", "ingest/", "console/"]),
    ];
    let mut wrong = Vec::new();
    for (path, code) in sources() {
        for (thing, allowed) in homes {
            if code.contains(thing) && !allowed.iter().any(|home| path.starts_with(home)) {
                wrong.push(format!("src/{path} uses {thing}, whose home is {allowed:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_opens_by_saying_what_it_is() {
    let mut silent = Vec::new();
    for folder in ["src", "tests"] {
        for path in files_below(&root().join(folder), "rs") {
            if !std::fs::read_to_string(&path).unwrap().starts_with("//! ") {
                silent.push(path);
            }
        }
    }
    assert!(silent.is_empty(), "{silent:#?}");
}

#[test]
fn nothing_panics_outside_of_tests() {
    let mut wrong = Vec::new();
    for (path, code) in sources() {
        for (number, line) in code.lines().enumerate() {
            let line = line.split("//").next().unwrap();
            for word in [".unwrap()", ".expect(", "panic!(", "unreachable!(", "todo!(", "unimplemented!("] {
                if line.contains(word) {
                    wrong.push(format!("src/{path}:{}: {word}", number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn sample_env_names_every_setting_with_its_default_and_no_other() {
    let sample = std::fs::read_to_string(root().join("sample.env")).unwrap();
    let lines: Vec<(&str, &str)> = sample
        .lines()
        .filter_map(|line| line.trim_start_matches('#').trim_start().split_once('='))
        .filter(|(name, _)| name.starts_with("FOREBAY_") && !name.contains(' '))
        .collect();
    let named: BTreeSet<&str> = lines.iter().map(|(name, _)| *name).collect();
    let known: BTreeSet<&str> = SETTINGS.iter().map(|setting| setting.variable).collect();
    assert_eq!(named, known);
    for setting in SETTINGS {
        let (_, text) = lines.iter().find(|(name, _)| *name == setting.variable).unwrap();
        assert_eq!(*text, setting.default, "{}", setting.variable);
    }
}

#[test]
fn the_compose_file_hands_down_only_settings_that_exist() {
    let compose = std::fs::read_to_string(root().join("docker-compose.yml")).unwrap();
    for word in compose.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|w| w.starts_with("FOREBAY_")) {
        assert!(SETTINGS.iter().any(|setting| setting.variable == word), "{word} is no setting");
    }
}

#[test]
fn the_readme_names_every_command() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    for command in forebay::commands::command_line().get_subcommands() {
        assert!(
            readme.contains(&format!("forebay {}", command.get_name())),
            "{} is not in README.md",
            command.get_name()
        );
    }
}

/// As text, each with its name.
fn planted_bugs() -> Vec<(String, String)> {
    let patches = files_below(&root().join("tests/planted-bugs"), "patch");
    let named =
        |path: PathBuf| (path.file_stem().unwrap().display().to_string(), std::fs::read_to_string(path).unwrap());
    patches.into_iter().map(named).collect()
}

#[test]
fn every_planted_bug_can_still_be_planted() {
    assert_eq!(planted_bugs().len(), 11);
    for (bug, _) in planted_bugs() {
        let checked = std::process::Command::new("git")
            .args(["apply", "--check", &format!("tests/planted-bugs/{bug}.patch")])
            .current_dir(root())
            // within another repository the paths would be taken from that one's root
            .env("GIT_CEILING_DIRECTORIES", root().parent().unwrap())
            .output()
            .expect("git is not installed");
        let said = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "tests/planted-bugs/{bug}.patch is to be made anew: {said}");
    }
}

#[test]
fn every_planted_bug_says_what_it_is_and_names_tests_that_there_are() {
    for (bug, text) in planted_bugs() {
        let mut lines = text.lines();
        assert!(lines.next().unwrap().ends_with('.'), "{bug} says what it is in its first line");
        let expected = lines.next().and_then(|line| line.strip_prefix("Expected: "));
        for test in expected.unwrap_or_else(|| panic!("{bug} names no test that catches it")).split(' ') {
            let (module, name) = test.split_once("::").unwrap();
            let code = std::fs::read_to_string(root().join(format!("tests/suite/{module}.rs"))).unwrap();
            let is_there = code.contains(&format!("fn {name}(")) || code.contains(&format!(" {name}: "));
            assert!(is_there, "{bug} is to be caught by {test}, which is not there");
        }
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut broken = Vec::new();
    let documents = ["README.md", "ARCHITECTURE.md"].iter().map(|name| root().join(name));
    for document in documents.chain(files_below(&root().join("docs"), "md")) {
        let text = std::fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap();
            let elsewhere = target.is_empty() || target.starts_with("http");
            if !elsewhere && !document.parent().unwrap().join(target).exists() {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
