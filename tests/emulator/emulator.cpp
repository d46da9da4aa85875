// Runs the threads of a launch on the host; see cuda_runtime.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(VLM_FUSE_EMULATE_WITH_THREADS)
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

void fail(const char* why) {
  std::fprintf(stderr, "emulator: %s\n", why);
  std::abort();
}

namespace {

constexpr int kWarpSize = 32;
constexpr unsigned char kBefore = 0xcd, kAfter = 0xdb;  // what shared memory holds before its block begins, and after

// From the environment, so that a failure can be repeated and each kind of device be tried.
long setting(const char* name, long otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtol(value, nullptr, 10);
}

// A block's shared memory, as large as the launch said, to the byte.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), data_(static_cast<char*>(std::aligned_alloc(16, rounded()))) {
    std::memset(data_, kBefore, rounded());
    forbid(data_ + bytes_, rounded() - bytes_);
  }
  ~SharedMemory() {
    allow(data_, rounded());
    std::free(data_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void end() {
    std::memset(data_, kAfter, bytes_);
    forbid(data_, bytes_);
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t rounded() const { return std::max<size_t>(16, (bytes_ + 15) / 16 * 16); }

  static void forbid(char* from, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(from, bytes);
#else
    (void)from, (void)bytes;
#endif
  }
  static void allow(char* from, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(from, bytes);
#else
    (void)from, (void)bytes;
#endif
  }

  size_t bytes_;
  char* data_;
};

struct Barrier {
  int members = 0;
  int waiting = 0;
  unsigned round = 0;
#if defined(VLM_FUSE_EMULATE_WITH_THREADS)
  // of its own: a common one would put threads in order that only pass different barriers, and hide races
  std::mutex mutex;
  std::condition_variable passed;
#endif
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarpSize];  // a lane is at most one exchange ahead of another
};

struct Block {
  explicit Block(size_t shared, int threads) : memory(shared), warps(static_cast<size_t>(threads / kWarpSize)) {
    barrier.members = running = threads;
    for (Warp& warp : warps) warp.barrier.members = kWarpSize;
  }
  SharedMemory memory;
  Barrier barrier;
  std::vector<Warp> warps;
  int running;
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Running : Thread {
  Cluster* cluster = nullptr;
  Block* owner = nullptr;
  Warp* in_warp = nullptr;
  int rank = 0;       // of the block in its cluster
  unsigned turn = 0;  // exchanges so far
  bool done = false;
#if !defined(VLM_FUSE_EMULATE_WITH_THREADS)
  Barrier* waits_at = nullptr;
  unsigned waits_round = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
#endif
};

Running& running() { return *static_cast<Running*>(current); }

}  // namespace

#if defined(VLM_FUSE_EMULATE_WITH_THREADS)

// --- threads of the system -------------------------------------------------------------------------------------------

thread_local Thread* current = nullptr;

namespace {

void wait_at(Barrier& barrier) {
  std::unique_lock<std::mutex> lock(barrier.mutex);
  const unsigned round = barrier.round;
  if (++barrier.waiting == barrier.members) {
    barrier.waiting = 0;
    ++barrier.round;
    barrier.passed.notify_all();
    return;
  }
  if (!barrier.passed.wait_for(lock, std::chrono::seconds(60), [&] { return barrier.round != round; })) {
    fail("a thread waits at a barrier that others do not reach");
  }
}

void run_threads(std::vector<Running>& threads, const std::function<void()>& kernel) {
  std::vector<std::thread> workers;
  for (Running& thread : threads) {
    workers.emplace_back([&thread, &kernel] {
      current = &thread;
      kernel();
      std::lock_guard<std::mutex> lock(thread.owner->barrier.mutex);
      if (--thread.owner->running == 0) thread.owner->memory.end();
    });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

#else

// --- fibers ----------------------------------------------------------------------------------------------------------

Thread* current = nullptr;

namespace {

constexpr size_t kStack = 64 * 1024;

// Saves what the calling convention has the callee keep, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
__asm__(
    ".text\n.globl emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size emulator_switch,.-emulator_switch\n.previous\n");
constexpr int kSaved = 6;
#elif defined(__aarch64__)
__asm__(
    ".text\n.globl emulator_switch\n.type emulator_switch,%function\nemulator_switch:\n"
    "  sub sp, sp, #160\n  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n  add sp, sp, #160\n  ret\n"
    ".size emulator_switch,.-emulator_switch\n.previous\n");
#else
#error "the emulator knows how to change fibers on x86-64 and aarch64"
#endif

void* scheduler = nullptr;  // its stack pointer while a fiber runs
const std::function<void()>* running_kernel = nullptr;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

void to_scheduler(bool for_good) {
  Running& self = running();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
#else
  (void)for_good;
#endif
  emulator_switch(&self.stack_pointer, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

extern "C" void emulator_begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*running_kernel)();
  running().done = true;
  to_scheduler(true);
  fail("a thread that has ended goes on");
}

void to_fiber(Running& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
  emulator_switch(&scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Stacks are kept for the next launch.
char* stack_of(size_t number) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= number) stacks.emplace_back(new char[kStack]);
  return stacks[number].get();
}

void prepare(Running& fiber, char* stack) {
  fiber.stack = stack;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStack);  // of frames that never returned
#endif
  auto top = reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t{15};
#if defined(__x86_64__)
  // as after a call: the stack is 8 short of a multiple of 16 when the function begins
  auto* slots = reinterpret_cast<uintptr_t*>(top) - 2 - kSaved;
  std::fill(slots, slots + kSaved + 2, 0);
  slots[kSaved] = reinterpret_cast<uintptr_t>(&emulator_begin);
#else
  auto* slots = reinterpret_cast<uintptr_t*>(top) - 20;
  std::fill(slots, slots + 20, 0);
  slots[11] = reinterpret_cast<uintptr_t>(&emulator_begin);
#endif
  fiber.stack_pointer = slots;
}

void wait_at(Barrier& barrier) {
  if (++barrier.waiting == barrier.members) {
    barrier.waiting = 0;
    ++barrier.round;
    return;
  }
  Running& self = running();
  self.waits_at = &barrier;
  self.waits_round = barrier.round;
  to_scheduler(false);
}

bool ready(const Running& fiber) {
  return !fiber.done && (fiber.waits_at == nullptr || fiber.waits_at->round != fiber.waits_round);
}

void run_threads(std::vector<Running>& threads, const std::function<void()>& kernel) {
  static std::mt19937 random(static_cast<unsigned>(setting("VLM_FUSE_EMULATOR_SEED", 1)));
  running_kernel = &kernel;
  for (size_t i = 0; i < threads.size(); ++i) prepare(threads[i], stack_of(i));
  std::vector<size_t> warps(threads.size() / kWarpSize);
  std::iota(warps.begin(), warps.end(), size_t{0});
  std::shuffle(warps.begin(), warps.end(), random);
  const size_t flipped = random() % 2 == 0 ? 0 : kWarpSize - 1;  // lanes in order, or the last one first
  size_t left = threads.size();
  while (left > 0) {
    bool went_on = false;
    for (size_t i = 0; i < warps.size(); ++i) {
      if (i + 1 == warps.size() && went_on) break;  // the last one goes on only when no other can
      for (size_t lane = 0; lane < kWarpSize; ++lane) {
        Running& fiber = threads[warps[i] * kWarpSize + (lane ^ flipped)];
        if (!ready(fiber)) continue;
        fiber.waits_at = nullptr;
        to_fiber(fiber);
        went_on = true;
        if (!fiber.done) continue;
        --left;
        if (--fiber.owner->running == 0) fiber.owner->memory.end();
      }
    }
    if (!went_on) fail("threads wait at a barrier that others do not reach");
  }
  current = nullptr;
}

}  // namespace

#endif

void warp_barrier() { wait_at(running().in_warp->barrier); }
void block_barrier() { wait_at(running().owner->barrier); }
void cluster_barrier(const char* file, int line) {
  if (!left_out(file, line)) wait_at(running().cluster->barrier);
}

bool left_out(const char* file, int line) {
  struct Skip {
    std::string file;
    int line = 0;
    Skip() {
      const char* asked = std::getenv("VLM_FUSE_EMULATOR_SKIPS");
      const char* colon = asked == nullptr ? nullptr : std::strrchr(asked, ':');
      if (colon == nullptr) return;
      file.assign(asked, colon);
      line = std::atoi(colon + 1);
    }
  };
  static const Skip skip;
  if (line != skip.line) return false;
  const char* name = std::strrchr(file, '/');
  if ((name == nullptr ? file : name + 1) != skip.file) return false;
  static std::atomic<bool> told{false};
  if (!told.exchange(true)) std::fprintf(stderr, "emulator: leaves out the barrier at %s:%d\n", skip.file.c_str(), line);
  return true;
}

const uint64_t* exchange(uint64_t value) {
  Running& self = running();
  uint64_t* values = self.in_warp->values[self.turn++ % 2];
  values[self.thread.x % kWarpSize] = value;
  warp_barrier();
  return values;
}

void* shared_memory(size_t bytes) {
  Block& block = *running().owner;
  if (bytes > block.memory.bytes()) fail("a kernel uses more shared memory than its launch gave");
  return block.memory.data();
}

int cluster_size() { return static_cast<int>(running().cluster->blocks.size()); }
int cluster_rank() { return running().rank; }

void* in_block(void* shared, int rank) {
  const Running& self = running();
  const auto offset = static_cast<char*>(shared) - self.owner->memory.data();
  if (rank < 0 || rank >= cluster_size() || offset < 0 || static_cast<size_t>(offset) >= self.owner->memory.bytes()) {
    fail("not in the shared memory of a block of the cluster");
  }
  return self.cluster->blocks[static_cast<size_t>(rank)]->memory.data() + offset;
}

namespace {
unsigned long launches = 0;
}

void run(const Shape& shape, const std::function<void()>& kernel) {
  ++launches;
  static const bool idle = setting("VLM_FUSE_EMULATOR_IDLE", 0) != 0;  // to time what a call costs the host
  if (idle) return;
  const int threads_each = static_cast<int>(shape.block.x);
  for (unsigned first = 0; first < shape.grid.x; first += static_cast<unsigned>(shape.cluster)) {
    Cluster cluster;
    cluster.barrier.members = threads_each * shape.cluster;
    std::vector<Running> threads(static_cast<size_t>(threads_each * shape.cluster));
    for (int rank = 0; rank < shape.cluster; ++rank) {
      cluster.blocks.emplace_back(new Block(shape.shared, threads_each));
      for (int t = 0; t < threads_each; ++t) {
        Running& thread = threads[static_cast<size_t>(rank * threads_each + t)];
        thread.thread = dim3(static_cast<unsigned>(t), 0, 0);
        thread.block = dim3(first + static_cast<unsigned>(rank), 0, 0);
        thread.block_size = shape.block;
        thread.grid_size = shape.grid;
        thread.cluster = &cluster;
        thread.owner = cluster.blocks.back().get();
        thread.in_warp = &thread.owner->warps[static_cast<size_t>(t / kWarpSize)];
        thread.rank = rank;
      }
    }
    run_threads(threads, kernel);
  }
}

}  // namespace emulator

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int) {
  *value = static_cast<int>(asked == cudaDevAttrMultiProcessorCount ? emulator::setting("VLM_FUSE_EMULATED_PROCESSORS", 4)
                                                                    : emulator::setting("VLM_FUSE_EMULATED_CAPABILITY", 9));
  return cudaSuccess;
}

// How many launches there were so far; for ctypes.
extern "C" __attribute__((visibility("default"))) unsigned long emulator_launches() { return emulator::launches; }
