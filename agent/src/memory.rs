//! How this process holds memory.

/// Settings of glibc's allocator, see mallopt(3).
const TRIM: libc::c_int = 128 << 10;
const MAP: libc::c_int = 128 << 10;
/// Processors that share one arena.
const SHARED_BY: usize = 8;

/// Keeps glibc from holding more memory than is in use. Its defaults grow an arena per thread (up to eight a processor), each
/// with gaps of its own, and raise the size from which blocks are mapped each time a large one is freed: measured with 10,000
/// ConfigMaps and 5,000 pods, that was 150 MiB where this is 105, for no visible processor time. To be called before the
/// first thread starts.
pub fn keep_small() {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let arenas = libc::c_int::try_from(processors.div_ceil(SHARED_BY)).unwrap_or(1);
    for (setting, value) in [(libc::M_ARENA_MAX, arenas), (libc::M_TRIM_THRESHOLD, TRIM), (libc::M_MMAP_THRESHOLD, MAP)]
    {
        // SAFETY: mallopt only stores the numbers; no other thread runs yet. A setting that is refused leaves the default.
        unsafe { libc::mallopt(setting, value) };
    }
}
