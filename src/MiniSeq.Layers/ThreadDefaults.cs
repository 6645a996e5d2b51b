using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace MiniSeq.Layers;

/// <summary>
/// Lets libtorch's threads sleep soon when they wait for each other. GNU OpenMP's default is to spin, which makes the many short
/// operators of a mini-sequence several times slower as soon as another process wants a core, and gains nothing when none does.
/// </summary>
internal static class ThreadDefaults
{
    private const string SpinCount = "GOMP_SPINCOUNT";

    // GNU OpenMP reads the environment once, when it is loaded: this runs before the first layer can load libtorch.
    // .NET's own Environment does not reach native code on Unix.
#pragma warning disable CA2255 // A library may not need initializers as a rule; this one has no later moment.
    [ModuleInitializer]
#pragma warning restore CA2255
    internal static void Apply()
    {
        if (!OperatingSystem.IsLinux() || Environment.GetEnvironmentVariable("OMP_WAIT_POLICY") is not null) return;
        _ = setenv(SpinCount, "1000", overwrite: 0);
    }

    [DllImport("libc", CharSet = CharSet.Ansi, BestFitMapping = false, ThrowOnUnmappableChar = true)]
    private static extern int setenv(string name, string value, int overwrite);
}
