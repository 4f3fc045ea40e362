#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kChunk = size_t{64} << 20;  // a mapping that small pieces share
constexpr size_t kKept = size_t{64} << 20;   // of scratch memory, per thread

constexpr size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// One mapping whose first byte lies at a multiple of a page.
class Mapping {
  public:
    explicit Mapping(size_t bytes) : size_(round_up(bytes, kPage) + kPage) {
        start_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start_ == MAP_FAILED) throw std::bad_alloc();
        first_ = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(start_), kPage));
        madvise(first_, size_ - kPage, MADV_HUGEPAGE);  // a wish: small pages serve as well
    }
    ~Mapping() { munmap(start_, size_); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    char* first() const { return first_; }
    size_t usable() const { return size_ - kPage; }

  private:
    size_t size_;
    void* start_;
    char* first_;
};

std::mutex chunk_mutex;
std::weak_ptr<Mapping> chunk;  // where the next small piece goes; alive as long as a piece of it
size_t chunk_used = 0;

}  // namespace

std::shared_ptr<void> allocate_streamed(size_t bytes) {
    bytes = round_up(bytes, 64);
    if (bytes > kChunk / 4) {
        auto own = std::make_shared<Mapping>(bytes);
        return {own, own->first()};
    }
    const std::lock_guard lock(chunk_mutex);
    auto shared = chunk.lock();
    if (!shared || chunk_used + bytes > kChunk) {
        shared = std::make_shared<Mapping>(kChunk);
        chunk = shared;
        chunk_used = 0;
    }
    char* piece = shared->first() + chunk_used;
    chunk_used += bytes;
    return {shared, piece};
}

void* scratch(size_t bytes) {
    thread_local std::unique_ptr<Mapping> kept;
    if (!kept || kept->usable() < bytes || (kept->usable() > kKept && bytes <= kKept)) {
        kept.reset();
        kept = std::make_unique<Mapping>(bytes);
    }
    return kept->first();
}
