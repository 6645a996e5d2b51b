using System.Runtime.InteropServices;
using TorchSharp;

namespace MiniSeq.Layers;

/// <summary>
/// Memory of CPU tensors: an exact count of the bytes that libtorch's allocator holds, now and at their peak, and the settings of
/// the C allocator under which large tensors are fast. Linux only; elsewhere <see cref="StartCounting"/> returns false.
/// </summary>
/// <remarks>
/// TorchSharp has no allocator statistics. The counter replaces two entries in the function table of c10's CPU allocator (libtorch
/// 2.10, Itanium ABI), and checks itself before it says that it counts. It sees every tensor, and neither managed memory nor scratch
/// space inside a kernel: <see cref="PeakResidentBytes"/> is the second figure.
/// </remarks>
public static unsafe class TensorMemory
{
    // Slots of the table: offset to top, type information, two destructors, then:
    private const int AllocateSlot = 4, RawDeleterSlot = 6, Slots = 10;

    private static readonly Lock s_lock = new();
    private static long s_live;
    private static long s_peak;
    private static bool? s_counting;
    private static delegate* unmanaged<void*, void*, nuint, void*> s_allocate;
    private static delegate* unmanaged<void*, void> s_delete;

    /// <summary>Bytes of tensors alive that were made since counting began.</summary>
    public static long LiveBytes => Volatile.Read(ref s_live);

    /// <summary>The largest <see cref="LiveBytes"/> since <see cref="ResetPeak"/>.</summary>
    public static long PeakBytes => Volatile.Read(ref s_peak);

    /// <summary>Begins to count, once for the process. False where the count would not be right.</summary>
    public static bool StartCounting()
    {
        lock (s_lock)
        {
            if (s_counting is null)
            {
                torch.InitializeDeviceType(DeviceType.CPU);
                s_counting = OperatingSystem.IsLinux() && TryHook() && Checks();
            }
            return s_counting.Value;
        }
    }

    /// <summary>The peak starts again from what is alive now.</summary>
    public static void ResetPeak() => Interlocked.Exchange(ref s_peak, LiveBytes);

    /// <summary>
    /// Keeps freed buffers in the process instead of giving them back to the system and faulting every page in again: large products
    /// run up to twice as fast (glibc's M_MMAP_MAX 0, no trimming, M_TOP_PAD 64 MiB). Does nothing but on Linux with glibc, or
    /// where the environment variable MINISEQ_MALLOPT is 0.
    /// </summary>
    public static void KeepFreedMemory()
    {
        if (!OperatingSystem.IsLinux() || Environment.GetEnvironmentVariable("MINISEQ_MALLOPT") == "0") return;
        const int TrimThreshold = -1, TopPad = -2, MmapMax = -4;
        try
        {
            mallopt(MmapMax, 0);
            mallopt(TrimThreshold, -1); // never
            mallopt(TopPad, 64 << 20);
        }
        catch (EntryPointNotFoundException)
        {
            // Another C library (musl): its allocator has no such settings.
        }
    }

    /// <summary>The largest resident memory of the process since <see cref="ResetPeakResident"/>, in bytes.</summary>
    public static long PeakResidentBytes => OperatingSystem.IsLinux() ? KilobytesOf("/proc/self/status", "VmHWM:") : System.Diagnostics.Process.GetCurrentProcess().PeakWorkingSet64;

    /// <summary>Resident memory of the process now, in bytes.</summary>
    public static long ResidentBytes => OperatingSystem.IsLinux() ? KilobytesOf("/proc/self/status", "VmRSS:") : Environment.WorkingSet;

    /// <summary>Memory that the system could give to the process now without swapping, in bytes.</summary>
    public static long AvailableBytes => File.Exists("/proc/meminfo") ? KilobytesOf("/proc/meminfo", "MemAvailable:") : GC.GetGCMemoryInfo().TotalAvailableMemoryBytes - Environment.WorkingSet;

    /// <summary>The resident peak starts again from now. False where the system does not allow it.</summary>
    public static bool ResetPeakResident()
    {
        try
        {
            File.WriteAllText("/proc/self/clear_refs", "5");
            return true;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return false;
        }
    }

    private static bool TryHook()
    {
        string library = Path.Combine(AppContext.BaseDirectory, "libc10.so");
        if (!NativeLibrary.TryLoad(library, out var c10) && !NativeLibrary.TryLoad("libc10.so", out c10)) return false;
        if (!NativeLibrary.TryGetExport(c10, "_ZN3c1015GetCPUAllocatorEv", out var export)) return false;
        var allocator = (void**)((delegate* unmanaged<void*>)export)();
        var table = (void**)*allocator;
        var copy = (void**)NativeMemory.Alloc(Slots, (nuint)sizeof(void*)); // for the life of the process
        for (int i = 0; i < Slots; i++) copy[i] = table[i - 2];
        s_allocate = (delegate* unmanaged<void*, void*, nuint, void*>)copy[AllocateSlot];
        s_delete = (delegate* unmanaged<void*, void>)((delegate* unmanaged<void*, void*>)copy[RawDeleterSlot])(allocator);
        copy[AllocateSlot] = (delegate* unmanaged<void*, void*, nuint, void*>)&Allocate;
        copy[RawDeleterSlot] = (delegate* unmanaged<void*, void*>)&RawDeleter;
        *allocator = copy + 2;
        return true;
    }

    private static bool Checks()
    {
        const long Bytes = 4 << 20;
        long before = LiveBytes;
        long during;
        using (torch.empty(Bytes, torch.ScalarType.Byte)) during = LiveBytes;
        return during - before is >= Bytes and < Bytes + (64 << 10) && LiveBytes == before;
    }

    // c10::DataPtr is returned through memory: data, deleter, context, device.
    [UnmanagedCallersOnly]
    private static void* Allocate(void* result, void* self, nuint bytes)
    {
        s_allocate(result, self, bytes);
        var words = (void**)result;
        if (words[1] != (void*)s_delete || words[2] == null) return result;
        words[1] = (delegate* unmanaged<void*, void>)&Delete;
        Count((long)malloc_usable_size(words[2]));
        return result;
    }

    [UnmanagedCallersOnly]
    private static void* RawDeleter(void* self) => (delegate* unmanaged<void*, void>)&Delete;

    [UnmanagedCallersOnly]
    private static void Delete(void* memory)
    {
        if (memory != null) Interlocked.Add(ref s_live, -(long)malloc_usable_size(memory));
        s_delete(memory);
    }

    private static void Count(long bytes)
    {
        long live = Interlocked.Add(ref s_live, bytes);
        for (long peak = PeakBytes; live > peak; peak = PeakBytes)
            if (Interlocked.CompareExchange(ref s_peak, live, peak) == peak) break;
    }

    private static long KilobytesOf(string file, string name)
    {
        foreach (var line in File.ReadLines(file))
            if (line.StartsWith(name, StringComparison.Ordinal))
                return long.Parse(line.AsSpan(name.Length).Trim()[..^3].Trim(), System.Globalization.CultureInfo.InvariantCulture) * 1024; // "1234 kB"
        return 0;
    }

    [DllImport("libc.so.6")] private static extern int mallopt(int parameter, int value);
    [DllImport("libc.so.6"), SuppressGCTransition] private static extern nuint malloc_usable_size(void* memory);
}
