// A CUDA device that is not there: its tensors lie in host memory, and every operator runs on the
// CPU's kernel. What CUDA refuses is refused: operands on two devices, an operator without a CUDA
// kernel, a CPU generator, a wait for the device inside a capture. Loaded by fake_cuda/__init__.py.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>

using c10::Device;
using c10::IValue;
using c10::Storage;
using c10::StorageImpl;
using Stack = std::vector<IValue>;
constexpr auto GPU = c10::DeviceType::CUDA;

namespace {

// ---- memory: host memory, filled with NaN, counted in blocks of 512 bytes as CUDA's allocator does

std::atomic<int64_t> live{0}, peak{0}, launches{0};
int devices = 1;
thread_local int current = 0;
thread_local int64_t stream_id = 0;
std::mutex lock;
std::set<std::string> unchecked, missing;  // operators: no device check; no CUDA kernel
using Report = bool (*)(const char*, const char*);  // -> whether this wait is forbidden
Report report = nullptr;

void grow(int64_t n) {
  int64_t now = live += (n + 511) / 512 * 512, most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
}
void shrink(int64_t n) { live -= (n + 511) / 512 * 512; }

struct Memory {
  void* start;
  size_t size;
};
void release(void* context) {
  auto* m = static_cast<Memory*>(context);
  shrink(m->size);
  std::free(m->start);
  delete m;
}
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto* m = new Memory{n ? std::aligned_alloc(512, (n + 511) / 512 * 512) : nullptr, n};
    if (n) std::memset(m->start, 0xff, n);  // what nobody wrote is NaN, or -1
    grow(n);
    return {m->start, m, &release, Device(GPU, current)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Allocator allocator;

// Host memory that is pinned: a copy out of it, or into it, can be later than its launch. What comes
// to the host is written at the next wait, and is NaN until then.

std::map<const char*, size_t> pinned;
std::vector<std::pair<at::Tensor, at::Tensor>> arriving;  // (place on the host, what comes there)

void unpin(void* context) {
  {
    std::lock_guard<std::mutex> hold(lock);
    pinned.erase(static_cast<const char*>(context));
  }
  std::free(context);
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto* start = static_cast<char*>(std::aligned_alloc(64, (n + 64) / 64 * 64));
    std::lock_guard<std::mutex> hold(lock);
    pinned[start] = n + 1;
    return {start, start, &unpin, c10::kCPU};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> hold(lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  auto& [start, size] = *std::prev(after);
  return static_cast<const char*>(data) < start + size;
}

void arrive() {
  auto now = std::move(arriving);
  arriving.clear();
  for (auto& [place, x] : now) place.copy_(x);
}

struct Kept {  // CPU memory that an operator's CPU kernel has made, now of the device
  Storage storage;
  int64_t size;
};
void let_go(void* context) {
  auto* k = static_cast<Kept*>(context);
  shrink(k->size);
  delete k;
}
void drop(void* context) { delete static_cast<Storage*>(context); }

// ---- the device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return GPU; }
  Device exchangeDevice(Device d) const override {
    Device old(GPU, current);
    setDevice(d);
    return old;
  }
  Device getDevice() const override { return Device(GPU, current); }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < devices, "CUDA error: invalid device ordinal");
    if (d.index() >= 0) current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Stream getStream(Device d) const noexcept override { return c10::Stream(c10::Stream::UNSAFE, d, stream_id); }
  c10::Stream getDefaultStream(Device d) const override { return c10::Stream(c10::Stream::UNSAFE, d, 0); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override {
    return c10::Stream(c10::Stream::UNSAFE, d, 1);
  }
  c10::Stream getNewStream(Device d, int) const override { return c10::Stream(c10::Stream::UNSAFE, d, 1); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override {
    c10::Stream old(c10::Stream::UNSAFE, s.device(), stream_id);
    stream_id = s.id();
    return old;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- a capture: what is launched in it, replayed on the same memory

struct Launch {
  c10::OperatorHandle op;
  Stack arguments;
  std::vector<at::Tensor> made;  // where each result is written, undefined where it is in place
};
struct Graph {
  std::vector<Launch> launches;
  int64_t kernels = 0;  // launches that are no views
  std::unordered_map<StorageImpl*, Storage> pool;  // memory of its own
  std::unordered_map<StorageImpl*, c10::weak_intrusive_ptr<StorageImpl>> outside;
  std::unordered_map<StorageImpl*, std::pair<Storage, std::string>> before;  // a capture runs not
};
Graph* capture = nullptr;

// ---- operators

struct Aliases {
  std::vector<std::pair<StorageImpl*, Storage>> storages;      // of the CPU -> of the device
  std::vector<std::pair<c10::TensorImpl*, at::Tensor>> tensors;
};

at::Tensor make(Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return t;
}

at::Tensor lower(const at::Tensor& t, Aliases& aliases) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto* own = t.storage().unsafeGetStorageImpl();
  Storage found;
  for (auto& [alias, storage] : aliases.storages)
    if (storage.unsafeGetStorageImpl() == own)
      found = Storage(c10::intrusive_ptr<StorageImpl>::reclaim_copy(alias));
  if (!found) {
    void* data = const_cast<void*>(t.storage().data());
    c10::DataPtr p(data, c10::kCPU);
    bool external = capture && !capture->pool.count(own);
    if (!external) p = {data, new Storage(t.storage()), &drop, c10::kCPU};
    if (external)
      capture->outside.emplace(
          own, c10::weak_intrusive_ptr<StorageImpl>(t.storage().getWeakStorageImpl()));
    found = Storage(c10::make_intrusive<StorageImpl>(
        StorageImpl::use_byte_size_t(), t.storage().nbytes(), std::move(p),
        c10::GetAllocator(c10::kCPU), true));
    aliases.storages.emplace_back(found.unsafeGetStorageImpl(), t.storage());
  }
  auto c = make(found, c10::DispatchKey::CPU, t);
  aliases.tensors.emplace_back(c.unsafeGetTensorImpl(), t);
  return c;
}

Storage taken(const Storage& storage, int index) {
  auto* kept = new Kept{storage, static_cast<int64_t>(storage.nbytes())};
  grow(kept->size);
  c10::DataPtr p(const_cast<void*>(storage.data()), kept, &let_go, Device(GPU, index));
  Storage s(c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(p), &allocator, true));
  if (capture) capture->pool.emplace(s.unsafeGetStorageImpl(), s);
  return s;
}

void resized(Aliases& aliases) {  // an operand that its kernel gave more memory
  for (auto& [alias, storage] : aliases.storages) {
    if (alias->nbytes() == storage.nbytes()) continue;
    Storage whole(c10::intrusive_ptr<StorageImpl>::reclaim_copy(alias));
    auto* kept = new Kept{whole, static_cast<int64_t>(alias->nbytes())};
    Storage moved(c10::make_intrusive<StorageImpl>(
        StorageImpl::use_byte_size_t(), alias->nbytes(), alias->set_data_ptr(c10::DataPtr()),
        c10::GetAllocator(c10::kCPU), true));
    kept->storage = moved;
    grow(kept->size);
    void* data = const_cast<void*>(moved.data());
    alias->set_data_ptr_noswap(c10::DataPtr(data, c10::kCPU));  // for a capture
    storage.set_data_ptr_noswap(c10::DataPtr(data, kept, &let_go, storage.device()));
    storage.set_nbytes(moved.nbytes());
  }
}

at::Tensor raise(const at::Tensor& c, Aliases& aliases, int index) {
  if (!c.defined() || !c.device().is_cpu()) return c;
  for (auto& [alias, t] : aliases.tensors)
    if (alias == c.unsafeGetTensorImpl()) {
      if (t.sizes() != c.sizes() || t.strides() != c.strides())
        t.unsafeGetTensorImpl()->set_sizes_and_strides(c.sizes(), c.strides(), c.storage_offset());
      return t;
    }
  for (auto& [alias, storage] : aliases.storages)
    if (alias == c.storage().unsafeGetStorageImpl())
      for (auto& [other, t] : aliases.tensors)  // a view keeps the keys: inference mode wants it
        if (t.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) {
          auto view = at::detail::make_tensor<c10::TensorImpl>(
              c10::TensorImpl::VIEW, Storage(storage), t.key_set(), c.dtype());
          view.unsafeGetTensorImpl()->set_sizes_and_strides(
              c.sizes(), c.strides(), c.storage_offset());
          return view;
        }
  return make(taken(c.storage(), index), c10::DispatchKey::CUDA, c);
}

template <typename F>
void each(const IValue& x, F f) {
  if (x.isTensor()) {
    f(x.toTensor());
  } else if (x.isTensorList()) {
    for (const at::Tensor& t : x.toTensorVector()) f(t);
  } else if (x.isOptionalTensorList()) {
    for (const auto& t : x.toOptionalTensorVector())
      if (t.has_value()) f(*t);
  }
}

template <typename F>
IValue mapped(const IValue& x, F f) {
  if (x.isTensor()) return f(x.toTensor());
  if (x.isTensorList()) {
    std::vector<at::Tensor> out;
    for (const at::Tensor& t : x.toTensorVector()) out.push_back(f(t));
    return out;
  }
  if (x.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const auto& t : x.toOptionalTensorVector())
      out.push_back(t.has_value() ? std::optional<at::Tensor>(f(*t)) : std::nullopt);
    return out;
  }
  if (x.isDevice() && x.toDevice().type() == GPU) return IValue(Device(c10::kCPU));
  return x;
}

void waits(const char* kind, const std::string& name) {
  TORCH_CHECK(
      !capture, "CUDA error: operation not permitted when stream is capturing (", name, ": ", kind,
      ")");
  arrive();
  bool forbidden = report && report(kind, name.c_str());
  TORCH_CHECK(!forbidden, "called a synchronizing CUDA operation (", name, ": ", kind, ")");
}

bool takes_any_index(const std::string& name) {
  return name == "aten::index" || name == "aten::_index_put_impl_" || name == "aten::index_put_" ||
      name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
}

// What CUDA's own kernels refuse, and where they wait for the device
void check(const c10::OperatorHandle& op, const Stack& arguments) {
  const auto& schema = op.schema();
  const auto& name = op.operator_name().name;
  std::string full = name + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  bool loose = unchecked.count(full), index = takes_any_index(name);
  bool written_index = name.find("index_put") != std::string::npos;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !missing.count(full), "Could not run '", full, "' with arguments from the 'CUDA' backend.");
  Device place(GPU, -1);
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& argument = schema.arguments()[i];
    bool written = argument.alias_info() && argument.alias_info()->isWrite();
    TORCH_CHECK(
        !arguments[i].isGenerator() || !arguments[i].toGenerator().defined() ||
            !arguments[i].toGenerator().device().is_cpu(),
        "Expected a 'cuda' device type for generator but found 'cpu' (", full, ")");
    each(arguments[i], [&](const at::Tensor& t) {
      if (!t.defined()) return;
      if (t.is_cuda()) {
        TORCH_CHECK(
            place.index() < 0 || place == t.device(), "Expected all tensors to be on the same ",
            "device, but found at least two devices, ", place, " and ", t.device(), "! (", full, ")");
        place = t.device();
        return;
      }
      if (index && argument.name() == "indices") {
        if (written_index) waits("index from the CPU", full);  // else it was moved before
        return;
      }
      bool scalar = loose && t.dim() == 0 && !written;
      TORCH_CHECK(
          scalar, "Expected all tensors to be on the same device, but found at least two devices, ",
          "cuda:0 and ", t.device(), "! (argument ", argument.name(), " of ", full, ")");
    });
  }
  static const std::set<std::string> counted = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2",  "aten::unique_dim",
      "aten::equal",   "aten::bincount",      "aten::unique_consecutive"};
  if (name == "aten::_local_scalar_dense") waits("a number is read", full);
  if (counted.count(name)) waits("its shape is read", full);
  if (full == "aten::repeat_interleave.Tensor" && arguments.back().isNone())
    waits("its shape is read", full);
  if (written_index)  // a mask that is read by has met nonzero before
    each(arguments[1], [&](const at::Tensor& t) {
      if (t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte))
        waits("indexed by a mask", full);
    });
  const auto& returns = schema.returns();
  bool view = !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
  if (!view) launches++;  // a view launches nothing
  if (!view && capture) capture->kernels++;
}

void save_before(const c10::OperatorHandle& op, const Stack& arguments) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto* alias = op.schema().arguments()[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    each(arguments[i], [&](const at::Tensor& t) {
      auto* own = t.storage().unsafeGetStorageImpl();
      if (capture->pool.count(own) || capture->before.count(own)) return;
      auto* data = static_cast<const char*>(t.storage().data());
      capture->before.emplace(
          own, std::make_pair(t.storage(), std::string(data, t.storage().nbytes())));
    });
  }
}

std::vector<at::Tensor> flat(const Stack& results) {
  std::vector<at::Tensor> out;
  for (const auto& x : results) each(x, [&](const at::Tensor& t) { out.push_back(t); });
  return out;
}

void run(const c10::OperatorHandle& op, Stack* stack) {
  const size_t n = op.schema().arguments().size();
  Stack given(stack->end() - n, stack->end());
  check(op, given);
  if (capture) save_before(op, given);
  stack->erase(stack->end() - n, stack->end());
  int index = current;
  for (const auto& x : given)
    each(x, [&](const at::Tensor& t) {
      if (t.defined() && t.is_cuda()) index = t.device().index();
    });
  Aliases aliases;
  Stack lowered;
  for (const auto& x : given)
    lowered.push_back(mapped(x, [&](const at::Tensor& t) { return lower(t, aliases); }));
  const auto& name = op.operator_name().name;
  if (name == "aten::_softmax" || name == "aten::_log_softmax")
    if (lowered[2].isBool() && lowered[2].toBool()) {  // half to float, one kernel on CUDA alone
      lowered[0] = lowered[0].toTensor().to(at::kFloat);
      lowered[2] = false;
    }
  Stack results = lowered;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &results);
  resized(aliases);
  Stack raised;
  for (const auto& x : results)
    raised.push_back(mapped(x, [&](const at::Tensor& t) { return raise(t, aliases, index); }));
  if (capture) {
    Launch launch{op, lowered, {}};
    auto low = flat(results), high = flat(raised);
    for (size_t i = 0; i < low.size(); i++) {
      bool fresh = low[i].defined();
      for (auto& [alias, storage] : aliases.storages)
        fresh = fresh && low[i].storage().unsafeGetStorageImpl() != alias;
      launch.made.push_back(fresh ? low[i] : at::Tensor());
    }
    capture->launches.push_back(std::move(launch));
  }
  for (auto& x : raised) stack->push_back(std::move(x));
}

void fallback(const c10::OperatorHandle& op, Stack* stack) { run(op, stack); }

void copy_(const c10::OperatorHandle& op, Stack* stack) {
  const size_t n = stack->size() - 3;
  at::Tensor to = (*stack)[n].toTensor(), from = (*stack)[n + 1].toTensor();
  if (to.is_cuda() && from.is_cuda()) return run(op, stack);
  const at::Tensor& host = to.is_cuda() ? from : to;
  bool later = (*stack)[n + 2].toBool() && is_pinned(host.const_data_ptr());
  if (!later) waits(to.is_cuda() ? "to the device" : "to the CPU", "aten::copy_");
  Aliases aliases;
  Stack lowered = {lower(to, aliases), lower(from, aliases), false};
  if (later && !to.is_cuda()) {
    arriving.emplace_back(to, lowered[1].toTensor().to(to.scalar_type(), false, true));
    std::memset(to.data_ptr(), 0xff, to.nbytes());
  } else {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &lowered);
  }
  stack->erase(stack->begin() + n, stack->end());
  stack->push_back(to);
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(GPU, current)));
  at::Tensor t = at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())), format);
  if (capture) capture->pool.emplace(t.storage().unsafeGetStorageImpl(), t.storage());
  return t;
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(GPU, current)));
  at::Tensor t = at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())));
  if (capture) capture->pool.emplace(t.storage().unsafeGetStorageImpl(), t.storage());
  return t;
}

const at::Tensor& resize_(
    const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t need = at::detail::computeStorageNbytesContiguous(
      size, self.dtype().itemsize(), self.storage_offset());
  const Storage& s = self.storage();
  if (need > s.nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto more = allocator.allocate(need);
    if (s.nbytes()) std::memcpy(more.get(), s.data(), s.nbytes());
    s.set_data_ptr_noswap(std::move(more));
    s.set_nbytes(need);
  }
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> dense(size.size(), 1);
  for (int64_t i = static_cast<int64_t>(size.size()) - 2; i >= 0; i--)
    dense[i] = dense[i + 1] * std::max<int64_t>(size[i + 1], 1);
  impl->set_sizes_and_strides(size, stride.empty() ? at::IntArrayRef(dense) : stride, offset);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, Storage source) {
  int64_t n = source.nbytes() / self.dtype().itemsize();
  return set_storage(self, std::move(source), 0, {n}, {});
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole));
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&copy_>());
}

std::string text;

template <typename F>
const char* told(F f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
}

}  // namespace

namespace at {
struct FakeHooks final : CUDAHooksInterface {
  FakeHooks() = default;
  explicit FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex i) const override { current = i; }
  DeviceIndex exchangeDevice(DeviceIndex i) const override { return std::exchange(current, i); }
  DeviceIndex maybeExchangeDevice(DeviceIndex i) const override { return exchangeDevice(i); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  void deviceSynchronize(DeviceIndex) const override {}
};
}  // namespace at

extern "C" {
void fake_begin(int n, const char* loose, const char* lacking, Report f) {
  devices = n;
  report = f;
  auto fill = [](std::set<std::string>& names, const char* lines) {
    std::string line;
    for (const char* c = lines; *c; c++) {
      if (*c != '\n') { line += *c; continue; }
      names.insert(line);
      line.clear();
    }
  };
  fill(unchecked, loose);
  fill(missing, lacking);
  c10::SetAllocator(GPU, &allocator);
  static at::FakeHooks hooks;  // getCUDAHooks has made a plain one by now: it becomes this one
  auto& made = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(&made), static_cast<void*>(&hooks), sizeof(void*));
}
int64_t fake_number(int which) {
  return which == 0 ? live.load() : which == 1 ? peak.load() : launches.load();
}
void fake_reset_peak() { peak = live.load(); }
void fake_arrive() { arrive(); }
void* fake_capture_begin() { return capture = new Graph; }
void fake_capture_end() {
  for (auto& [own, kept] : capture->before)
    std::memcpy(const_cast<void*>(kept.first.data()), kept.second.data(), kept.second.size());
  capture->before.clear();
  capture = nullptr;
}
int64_t fake_graph_size(void* graph) { return static_cast<Graph*>(graph)->kernels; }
const char* fake_replay(void* graph) {
  return told([&] {
    at::AutoDispatchBelowADInplaceOrView below;
    auto* g = static_cast<Graph*>(graph);
    for (auto& [own, weak] : g->outside)
      TORCH_CHECK(!weak.expired(), "a graph reads memory that was freed since its capture");
    for (auto& launch : g->launches) {
      Stack stack = launch.arguments;
      launch.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
      auto results = flat(stack);
      for (size_t i = 0; i < results.size(); i++)
        if (launch.made[i].defined()) launch.made[i].copy_(results[i]);
    }
    launches++;
  });
}
void fake_graph_end(void* graph) { delete static_cast<Graph*>(graph); }
}
