//! Stories about the log on disk.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::*;

const SMALL: u64 = 64 << 10;

fn id(term: u64, index: u64) -> LogId {
    LogId { term, index }
}

fn payload(index: u64) -> Bytes {
    Bytes::from(format!("entry {index} ").repeat(20))
}

fn entry(term: u64, index: u64) -> NewEntry {
    NewEntry { id: id(term, index), payload: vec![payload(index)] }
}

fn open(dir: &Path) -> Wal {
    Wal::open(dir, WalOptions::new(SMALL)).unwrap()
}

/// Runs one request and waits until it is durable.
fn wait(request: impl FnOnce(Done)) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel();
    request(Box::new(move |result| sender.send(result).unwrap()));
    receiver.recv_timeout(Duration::from_secs(10)).unwrap()
}

fn append(wal: &Wal, term: u64, indexes: std::ops::Range<u64>) {
    let entries: Vec<NewEntry> = indexes.map(|index| entry(term, index)).collect();
    for chunk in entries.chunks(25) {
        wait(|done| wal.append(chunk.to_vec(), done).unwrap()).unwrap();
    }
}

fn assert_holds(wal: &Wal, indexes: std::ops::Range<u64>) {
    for index in indexes.clone() {
        let (_, read) = wal.read(index).unwrap().unwrap_or_else(|| panic!("entry {index} is missing"));
        assert_eq!(read, payload(index));
    }
    assert_eq!(wal.last().map(|last| last.index), indexes.end.checked_sub(1));
}

fn only_segment(dir: &Path) -> std::fs::File {
    std::fs::OpenOptions::new().read(true).write(true).open(segment::path_of(dir, 1)).unwrap()
}

fn place(wal: &Wal, index: u64) -> (u64, u64) {
    let location = wal.index.lock().location(index).unwrap();
    (u64::from(location.offset), u64::from(location.length))
}

#[test]
fn everything_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    let vote = Vote { term: 2, member: 77, committed: true };
    wait(|done| wal.save_vote(vote, done)).unwrap();
    append(&wal, 2, 0..10);
    wal.save_committed(id(2, 8));
    wait(|done| wal.truncate_from(9, done)).unwrap();
    append(&wal, 3, 9..12);
    drop(wal);
    let wal = open(dir.path());
    assert_eq!((wal.vote(), wal.committed(), wal.last()), (Some(vote), Some(id(2, 8)), Some(id(3, 11))));
    assert_eq!((wal.id(8), wal.id(9)), (Some(id(2, 8)), Some(id(3, 9))));
    assert_holds(&wal, 0..12);
}

#[test]
fn the_log_goes_on_over_many_segments_and_purging_frees_them() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    wal.allow_spares();
    let vote = Vote { term: 1, member: 5, committed: true };
    wait(|done| wal.save_vote(vote, done)).unwrap();
    append(&wal, 1, 0..3000);
    assert!(segment::list(dir.path()).unwrap().len() > 3);
    wait(|done| wal.purge(id(1, 2900), done)).unwrap();
    append(&wal, 1, 3000..3010);
    assert!(segment::list(dir.path()).unwrap().len() < 4);
    // The spare may be on its way (a thread of its own fills it), or be wanted only when the segment is half full again.
    let mut end = 3010;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !segment::spare_exists(dir.path()) {
        assert!(std::time::Instant::now() < deadline, "a spare waits for the next segment");
        append(&wal, 1, end..end + 10);
        end += 10;
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    drop(wal);
    let wal = open(dir.path());
    assert_eq!((wal.bounds(), wal.purged(), wal.vote()), ((2901, end), Some(id(1, 2900)), Some(vote)));
    assert!(wal.read(2900).unwrap().is_none());
    assert_eq!(wal.read(2901).unwrap().unwrap().1, payload(2901));
}

#[test]
fn a_recycled_segment_does_not_give_back_its_old_records() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    for round in 0..20 {
        append(&wal, 1, round * 400..(round + 1) * 400);
        wait(|done| wal.purge(id(1, (round + 1) * 400 - 2), done)).unwrap();
    }
    drop(wal);
    let last = *segment::list(dir.path()).unwrap().last().unwrap();
    assert!(last > 5, "segments were used in turn");
    let wal = open(dir.path());
    assert_eq!(wal.bounds(), (7999, 8000));
    append(&wal, 2, 8000..8003);
    drop(wal);
    assert_eq!(open(dir.path()).last(), Some(id(2, 8002)));
}

#[test]
fn a_torn_last_record_is_cut_and_the_log_goes_on_there() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    append(&wal, 1, 0..5);
    let (offset, length) = place(&wal, 4);
    drop(wal);
    only_segment(dir.path()).write_all_at(&[0xee; 40], offset + length - 40).unwrap();
    let wal = open(dir.path());
    assert_holds(&wal, 0..4);
    append(&wal, 2, 4..6);
    drop(wal);
    let wal = open(dir.path());
    assert_holds(&wal, 0..6);
    assert_eq!(wal.id(4), Some(id(2, 4)));
}

#[test]
fn good_parts_of_a_torn_write_do_not_come_back_later() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    append(&wal, 1, 0..3);
    // One write of three entries, of which a power cut lost the first.
    wait(|done| wal.append((3..6).map(|at| entry(1, at)).collect(), done).unwrap()).unwrap();
    let (offset, length) = place(&wal, 3);
    drop(wal);
    only_segment(dir.path()).write_all_at(&vec![0; length as usize], offset).unwrap();
    let wal = open(dir.path());
    assert_holds(&wal, 0..3);
    // The same size in the same place: what followed the lost record would fit exactly behind it.
    append(&wal, 1, 3..4);
    drop(wal);
    assert_holds(&open(dir.path()), 0..4);
}

#[test]
fn damage_in_the_middle_refuses_to_start_and_names_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    for index in 0..20 {
        append(&wal, 1, index..index + 1);
    }
    let (offset, length) = place(&wal, 7);
    drop(wal);
    for damage in [vec![0x99; 1], vec![0; length as usize], vec![0; 3 * length as usize]] {
        let file = only_segment(dir.path());
        let mut original = vec![0; damage.len()];
        file.read_exact_at(&mut original, offset + 8).unwrap();
        file.write_all_at(&damage, offset + 8).unwrap();
        let error = Wal::open(dir.path(), WalOptions::new(SMALL)).err().unwrap();
        let WalError::Damaged { path, offset: at, .. } = &error else { panic!("{error}") };
        assert_eq!((path.as_path(), *at), (segment::path_of(dir.path(), 1).as_path(), offset));
        assert!(error.to_string().contains("re-seed this server"), "{error}");
        file.write_all_at(&original, offset + 8).unwrap();
    }
    assert_holds(&open(dir.path()), 0..20);
}

#[test]
fn a_missing_or_cut_segment_refuses_to_start() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    append(&wal, 1, 0..1500);
    drop(wal);
    let second = segment::path_of(dir.path(), 2);
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() / 4]).unwrap();
    let error = Wal::open(dir.path(), WalOptions::new(SMALL)).err().unwrap();
    assert!(error.to_string().contains("the log goes on in the next segment"), "{error}");
    std::fs::remove_file(&second).unwrap();
    let error = Wal::open(dir.path(), WalOptions::new(SMALL)).err().unwrap();
    assert!(error.to_string().contains("this segment is missing"), "{error}");
    std::fs::write(&second, &bytes).unwrap();
    std::fs::remove_file(segment::path_of(dir.path(), 1)).unwrap();
    let error = Wal::open(dir.path(), WalOptions::new(SMALL)).err().unwrap();
    assert!(error.to_string().contains("where entry 0 belongs"), "{error}");
}

#[test]
fn a_crash_between_two_segments_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    append(&wal, 1, 0..1000);
    drop(wal);
    // As if the second segment had not been made yet when the first was full.
    for sequence in segment::list(dir.path()).unwrap() {
        if sequence > 1 {
            std::fs::remove_file(segment::path_of(dir.path(), sequence)).unwrap();
        }
    }
    let wal = open(dir.path());
    let next = wal.last().unwrap().index + 1;
    assert!(next > 100);
    append(&wal, 2, next..next + 5);
    drop(wal);
    assert_holds(&open(dir.path()), 0..next + 5);
}

#[test]
fn a_failed_sync_stops_the_log_and_is_never_retried() {
    let dir = tempfile::tempdir().unwrap();
    let (broken, syncs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let sync: SyncFile = {
        let (broken, syncs) = (broken.clone(), syncs.clone());
        Arc::new(move |file| {
            syncs.fetch_add(1, Ordering::SeqCst);
            if broken.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(5)) } else { file.sync_data() }
        })
    };
    let wal = Wal::open(dir.path(), WalOptions { segment_size: SMALL, sync }).unwrap();
    append(&wal, 1, 0..3);
    broken.store(true, Ordering::SeqCst);
    let error = wait(|done| wal.append(vec![entry(1, 3)], done).unwrap()).unwrap_err();
    assert!(error.to_string().contains("this member stopped"), "{error}");
    broken.store(false, Ordering::SeqCst);
    let before = syncs.load(Ordering::SeqCst);
    wait(|done| wal.append(vec![entry(1, 4)], done).unwrap()).unwrap_err();
    assert_eq!(syncs.load(Ordering::SeqCst), before);
}

#[test]
fn many_requests_share_few_syncs() {
    let dir = tempfile::tempdir().unwrap();
    let syncs = Arc::new(AtomicUsize::new(0));
    let sync: SyncFile = {
        let syncs = syncs.clone();
        Arc::new(move |file| {
            syncs.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
            file.sync_data()
        })
    };
    let wal = Wal::open(dir.path(), WalOptions { segment_size: SMALL, sync }).unwrap();
    let (sender, receiver) = mpsc::channel();
    for index in 0..100 {
        let sender = sender.clone();
        wal.append(vec![entry(1, index)], Box::new(move |result| sender.send(result).unwrap())).unwrap();
        wal.save_committed(id(1, index));
    }
    for _ in 0..100 {
        receiver.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    }
    assert!(syncs.load(Ordering::SeqCst) < 20, "{syncs:?}");
}

#[test]
fn a_hole_in_the_entries_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(dir.path());
    append(&wal, 1, 0..3);
    assert!(wal.append(vec![entry(1, 4)], Box::new(|_| ())).is_err());
    assert!(wal.append(vec![entry(1, 3), entry(1, 5)], Box::new(|_| ())).is_err());
    append(&wal, 1, 3..4);
}

#[test]
fn a_log_without_a_prepared_segment_grows_by_zeros_before_anything_is_written_there() {
    let dir = tempfile::tempdir().unwrap();
    let lengths = Arc::new(Mutex::new(Vec::new()));
    let seen = lengths.clone();
    let sync = move |file: &std::fs::File| {
        let length = file.metadata()?.len();
        let mut last = [0; 8];
        file.read_exact_at(&mut last, length - 8)?;
        seen.lock().push((length, last));
        file.sync_data()
    };
    let options = WalOptions { segment_size: 4 << 20, sync: Arc::new(sync) };
    let wal = Wal::open(dir.path(), options.clone()).unwrap();
    append(&wal, 1, 0..5000);
    drop(wal);
    let wal = Wal::open(dir.path(), options).unwrap();
    append(&wal, 1, 5000..8000);
    let lengths = std::mem::take(&mut *lengths.lock());
    let grown: Vec<_> = lengths.windows(2).filter(|two| two[0].0 != two[1].0).collect();
    assert!(grown.len() >= 4, "the story did not happen: {lengths:?}");
    assert!(lengths.iter().all(|(_, last)| *last == [0; 8]), "a record reached the end of its file: {lengths:?}");
    assert_holds(&wal, 0..8000);
}
