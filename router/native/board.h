// A board: one segment of shared memory that every rank of a group maps, with flags that say what lies on it.
//
// Operations are numbered; every rank does the same ones in the same order. For operation n a rank writes into the
// parts of ring place n % kRing and raises its `posted` flag to n; a reader waits for the flags it needs, reads, and
// raises its own `taken` flag to n. A place is written again, by operation n + kRing, when all have taken n. So up to
// kRing operations may be under way, awaited in any order, and nobody overwrites what a slow rank still reads.
//
// Memory order: what is written before a flag is raised (release) is seen by whoever sees the flag (acquire). Numbers
// wrap around, hence the signed difference.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "futex.h"

namespace moestro {

constexpr uint32_t kRing = 4;
constexpr size_t kTokenBytes = 64;  // at the start of the segment: the name by which ranks know it for the same
constexpr size_t kPage = 4096;
constexpr uint32_t kBefore = -64;  // the operation before the first: soon after, every group sees the numbers wrap

// The group can do nothing more together: a peer is gone, late, or left.
struct Broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One rank's flags of one kind: two cache lines, since processors fetch them in pairs.
struct alignas(128) Flags {
  std::atomic<uint32_t> number[kRing];
  std::atomic<uint32_t> sleepers;  // who waits in the kernel for any of them
};

struct alignas(128) RankFlags {
  Flags posted, taken;
  std::atomic<uint32_t> closed;
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "flags in shared memory must not hide a lock");

inline int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

class Board {
 public:
  // Maps `fd`, and duplicates `peers`, pidfds by rank (-1 at `rank` itself).
  Board(int fd, int rank, int size, size_t part_bytes, int64_t spin_ns, int64_t timeout_ns,
        const std::vector<int>& peers)
      : rank_(rank), size_(size), part_bytes_(part_bytes), spin_ns_(spin_ns), timeout_ns_(timeout_ns) {
    void* base = mmap(nullptr, segment_bytes(size, part_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + strerror(errno));
    base_ = static_cast<char*>(base);
    ranks_ = reinterpret_cast<RankFlags*>(base_ + 2 * kTokenBytes);
    for (int peer : peers) peers_.push_back(peer < 0 ? -1 : fcntl(peer, F_DUPFD_CLOEXEC, 0));
  }

  // What rank 0 does to a fresh segment before any other rank knows of it.
  static void prepare(int fd, int size, const std::string& token) {
    void* heads = mmap(nullptr, heads_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (heads == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + strerror(errno));
    memcpy(heads, token.data(), std::min(token.size(), kTokenBytes));
    auto* ranks = reinterpret_cast<RankFlags*>(static_cast<char*>(heads) + 2 * kTokenBytes);
    for (int rank = 0; rank < size; ++rank)
      for (Flags* flags : {&ranks[rank].posted, &ranks[rank].taken})
        for (auto& number : flags->number) number.store(kBefore, std::memory_order_relaxed);
    munmap(heads, heads_bytes(size));
  }

  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  ~Board() {
    close();
    munmap(base_, segment_bytes(size_, part_bytes_));
    for (int peer : peers_)
      if (peer >= 0) ::close(peer);
  }

  static size_t heads_bytes(int size) {
    return (2 * kTokenBytes + size * sizeof(RankFlags) + kPage - 1) / kPage * kPage;
  }
  // Pages are the kernel's to give when they are first written: a large part costs what is used of it.
  static size_t segment_bytes(int size, size_t part_bytes) { return heads_bytes(size) + kRing * size * part_bytes; }

  int rank() const { return rank_; }
  int size() const { return size_; }
  size_t part_bytes() const { return part_bytes_; }

  char* part(int rank, uint32_t operation) const {
    return base_ + heads_bytes(size_) + (size_t(operation % kRing) * size_ + rank) * part_bytes_;
  }

  // The number of this rank's next operation, once its parts may be written.
  uint32_t begin() {
    check();
    const uint32_t last = last_.load(std::memory_order_relaxed), before = last + 1 - kRing;
    if (int32_t(ranks_[rank_].taken.number[before % kRing].load(std::memory_order_relaxed) - before) < 0)
      throw std::runtime_error("more than " + std::to_string(kRing) + " exchanges under way at once");
    await(&RankFlags::taken, before, 0, size_, "to take what it was sent");
    last_.store(last + 1, std::memory_order_relaxed);
    return last + 1;
  }

  // How many operations were begun here. Any thread.
  uint32_t operations() const { return last_.load(std::memory_order_relaxed) - kBefore; }

  void post(uint32_t operation) { raise(ranks_[rank_].posted, operation); }
  void take(uint32_t operation) { raise(ranks_[rank_].taken, operation); }

  void await_all(uint32_t operation) { await(&RankFlags::posted, operation, 0, size_, "to send"); }
  void await_one(uint32_t operation, int rank) { await(&RankFlags::posted, operation, rank, rank + 1, "to send"); }

  // Any thread. Peers that wait for this rank, or will, are told. Own calls fail from now on, also one that waits.
  void close() {
    closed_.store(true, std::memory_order_seq_cst);
    if (getpid() != process_) return;  // a fork that forgets its copy leaves no group
    ranks_[rank_].closed.store(1, std::memory_order_seq_cst);
    for (int rank = 0; rank < size_; ++rank)  // peers sleep at this rank's flags, this rank at theirs
      for (Flags* flags : {&ranks_[rank].posted, &ranks_[rank].taken})
        for (auto& number : flags->number) futex_wake_all(&number);
  }

 private:
  static bool reached(const std::atomic<uint32_t>& flag, uint32_t number,
                      std::memory_order order = std::memory_order_acquire) {
    return int32_t(flag.load(order) - number) >= 0;
  }

  // The flag is stored before the sleepers are counted, and a sleeper counts itself before it looks at the flag, both
  // in the one order that all threads agree on: one of the two sees the other.
  void raise(Flags& flags, uint32_t operation) {
    auto& flag = flags.number[operation % kRing];
    flag.store(operation, std::memory_order_seq_cst);
    if (flags.sleepers.load(std::memory_order_seq_cst)) futex_wake_all(&flag);
  }

  void await(Flags RankFlags::*kind, uint32_t number, int first, int end, const char* what) {
    check();
    for (int peer = first; peer < end; ++peer)
      if (!reached((ranks_[peer].*kind).number[number % kRing], number)) await_slowly(kind, number, peer, end, what);
  }

  void await_slowly(Flags RankFlags::*kind, uint32_t number, int peer, int end, const char* what) {
    Flags& flags = ranks_[peer].*kind;
    auto& flag = flags.number[number % kRing];
    const int64_t start = now_ns();
    while (now_ns() - start < spin_ns_)
      for (int i = 0; i < 32; ++i) {
        if (reached(flag, number)) return;
        relax();
      }
    while (true) {
      flags.sleepers.fetch_add(1, std::memory_order_seq_cst);
      const uint32_t seen = flag.load(std::memory_order_seq_cst);
      if (int32_t(seen - number) < 0) futex_wait(&flag, seen, kLookAfterNs);
      flags.sleepers.fetch_sub(1, std::memory_order_relaxed);
      if (reached(flag, number)) return;
      check();
      // Whoever else is awaited counts too: this peer may be waiting for one that is gone.
      for (int other = peer; other < end; ++other) {
        const char* fate = fate_of(other);
        if (fate && !reached((ranks_[other].*kind).number[number % kRing], number))
          fail("Connection to rank " + std::to_string(other) + " lost: " + fate);
      }
      if (now_ns() - start > timeout_ns_)
        fail("Timed out after " + std::to_string(timeout_ns_ / 1000000) + " ms waiting for rank " +
             std::to_string(peer) + " " + what);
    }
  }

  // What became of a peer that will post nothing more, or null.
  const char* fate_of(int peer) const {
    if (ranks_[peer].closed.load(std::memory_order_acquire)) return "it left the group";
    pollfd fd{peers_[peer], POLLIN, 0};  // poll passes over -1
    return poll(&fd, 1, 0) > 0 && fd.revents ? "its process is gone" : nullptr;
  }

  void check() const {
    if (!broken_.empty()) throw Broken(broken_);
    if (closed_.load(std::memory_order_acquire)) throw Broken("this process group is closed");
  }

  [[noreturn]] void fail(const std::string& why) {
    broken_ = why;
    close();
    throw Broken(why);
  }

  const pid_t process_ = getpid();
  static constexpr int64_t kLookAfterNs = 50000000;  // how often a sleeper looks whether its peer is alive

  int rank_, size_;
  size_t part_bytes_;
  int64_t spin_ns_, timeout_ns_;
  std::vector<int> peers_;
  char* base_;
  RankFlags* ranks_;
  std::atomic<uint32_t> last_ = kBefore;  // operation begun
  std::atomic<bool> closed_ = false;
  std::string broken_;  // the thread's that makes the calls
};

}  // namespace moestro
