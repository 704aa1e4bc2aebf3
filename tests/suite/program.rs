//! The command line: what it says, what it exits with, what it leaves behind.

use std::path::Path;

use crate::support::program::run;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_agrees_with_itself_and_removes_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        "demo",
        "--devices",
        "50",
        "--per-minute",
        "60",
        "--photo-bytes",
        "20kB",
        "--for",
        "4s",
        "--uplink-share",
        "2%",
    ];
    // a proxy of the environment is for the world outside, and here there is none
    let proxy = ("HTTP_PROXY".to_owned(), "http://127.0.0.1:9".to_owned());
    let done = run(&arguments, &[proxy.clone(), (proxy.0.to_lowercase(), proxy.1)], folder.path()).await;
    let page = text(&done.stdout);
    assert!(done.status.success(), "{page} {}", text(&done.stderr));
    assert!(page.contains("acknowledged = verified + still queued: nothing was lost"), "{page}");
    assert!(page.contains("of the allowance"), "{page}");
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "its data is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_in_which_no_photo_is_acknowledged_fails_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let done = run(&["demo", "--devices", "1", "--photo-bytes", "20kB", "--for", "0s"], &[], folder.path()).await;
    assert!(!done.status.success());
    assert!(text(&done.stdout).contains("NO photo was acknowledged"), "{}", text(&done.stdout));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_does_not_touch_a_folder_that_holds_something() {
    let folder = tempfile::tempdir().unwrap();
    let precious = folder.path().join("forebay-demo");
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("precious"), "data").unwrap();
    let done = run(&["demo", "--devices", "1", "--for", "1s"], &[], folder.path()).await;
    assert!(!done.status.success());
    assert!(text(&done.stderr).contains("exists already"), "{}", text(&done.stderr));
    assert!(precious.join("precious").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_is_told_whole_and_nothing_starts() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        ("FOREBAY_LISTEN".to_owned(), "nowhere".to_owned()),
        ("FOREBAY_UPLINK_SHARE".to_owned(), "120%".to_owned()),
        ("FOREBAY_QUEUE_URL".to_owned(), "mysql://user:s3cret@host/db".to_owned()),
        ("FOREBAY_UPLINK_RAET".to_owned(), "1Gbit/s".to_owned()),
    ];
    for role in ["serve", "ingest", "drain", "migrate", "config", "verify", "list"] {
        let done = run(&[role], &settings, folder.path()).await;
        let errors = text(&done.stderr);
        assert!(!done.status.success(), "{role}");
        for (name, _) in &settings {
            assert!(errors.contains(name.as_str()), "{role} does not name {name}: {errors}");
        }
        assert!(!errors.contains("s3cret") && !text(&done.stdout).contains("s3cret"), "{role}: {errors}");
    }
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_in_force_is_shown_with_its_origins_and_without_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        ("FOREBAY_QUEUE_URL".to_owned(), "postgres://forebay:s3cret@db/forebay".to_owned()),
        ("FOREBAY_UPLINK_SHARE".to_owned(), "30%".to_owned()),
    ];
    let done = run(&["config", "--retain", "1h"], &settings, folder.path()).await;
    let shown = text(&done.stdout);
    assert!(done.status.success());
    let line = |name: &str| shown.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(line("FOREBAY_UPLINK_SHARE").ends_with("environment"));
    assert!(line("FOREBAY_RETAIN").contains("1h") && line("FOREBAY_RETAIN").ends_with("flag"));
    assert!(line("FOREBAY_LISTEN").ends_with("default"));
    assert!(line("FOREBAY_QUEUE_URL").contains("postgres://forebay:***@db/forebay"));
    assert!(shown.contains("7.50 MB/s"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_week_is_shown_as_people_read_it() {
    let timetable = ("FOREBAY_DRAIN_TIMETABLE".to_owned(), "00:00,100% Mon-Fri 08:00,20% 19:00,100%".to_owned());
    // a zone that is not the machine's own: the program brings its rules along
    let zone = ("FOREBAY_TIMEZONE".to_owned(), "Pacific/Apia".to_owned());
    let done = run(&["config"], &[timetable, zone], Path::new("/")).await;
    let shown = text(&done.stdout);
    assert!(done.status.success(), "{}", text(&done.stderr));
    for line in [
        "the site's time zone is Pacific/Apia; there it is ",
        "  Mon-Fri    00:00-08:00  100%  25.0 MB/s",
        "             08:00-19:00   20%  5.00 MB/s",
        "             19:00-24:00  100%  25.0 MB/s",
        "  Sat-Sun    00:00-24:00  100%  25.0 MB/s",
        " of the uplink now: timetable: ",
    ] {
        assert!(shown.contains(line), "{line} is not in {shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_bucket_a_role_that_needs_one_says_so() {
    for role in ["serve", "drain", "verify"] {
        let done = run(&[role], &[], Path::new("/")).await;
        assert!(!done.status.success());
        assert!(text(&done.stderr).contains("FOREBAY_S3_BUCKET"), "{}", text(&done.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_where_nothing_runs_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let console = format!("127.0.0.1:{}", crate::support::free_port());
    let status = run(&["status", "--console-listen", &console], &[], folder.path()).await;
    assert!(!status.status.success());
    assert!(text(&status.stderr).contains(&console), "{}", text(&status.stderr));
    let list = run(&["list"], &[], folder.path()).await;
    assert!(text(&list.stderr).contains("FOREBAY_DATA_DIR"), "{}", text(&list.stderr));
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "looking makes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_explains_itself() {
    for command in [
        "demo", "serve", "ingest", "drain", "simulate", "verify", "status", "rate", "pause", "resume", "list",
        "migrate", "config",
    ] {
        let done = run(&[command, "--help"], &[], Path::new("/")).await;
        assert!(done.status.success(), "{command}");
        assert!(text(&done.stdout).contains("Usage: forebay"), "{command}");
    }
}
