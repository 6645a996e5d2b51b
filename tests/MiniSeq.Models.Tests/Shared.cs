using System.Runtime.CompilerServices;

namespace MiniSeq.Models.Tests;

/// <summary>Reference data that lies beside the repository and is not part of it: <c>../shared</c>, or where <c>MINISEQ_SHARED</c> says.</summary>
internal static class Shared
{
    /// <summary>The root folder of the repository these tests were built in.</summary>
    public static string Repository { get; } = System.IO.Path.GetFullPath(System.IO.Path.Combine(Here(), "..", "..", ".."));

    private static string Root { get; } = Environment.GetEnvironmentVariable("MINISEQ_SHARED") ?? Beside(Repository);

    /// <summary>The full path of a reference file or folder; skips the running test where there is none.</summary>
    public static string Path(string relative)
    {
        var path = System.IO.Path.Combine(Root, relative);
        Assert.SkipUnless(File.Exists(path) || Directory.Exists(path), $"{path} is not there.");
        return path;
    }

    /// <summary>The names of the folders in a reference folder; none where it is not there.</summary>
    public static string[] Folders(string relative)
    {
        var path = System.IO.Path.Combine(Root, relative);
        return Directory.Exists(path) ? [.. Directory.GetDirectories(path).Select(folder => System.IO.Path.GetFileName(folder)).Order(StringComparer.Ordinal)] : [];
    }

    // A git worktree lies one folder deeper than the repository: look one level further up too.
    private static string Beside(string repository)
    {
        var near = System.IO.Path.GetFullPath(System.IO.Path.Combine(repository, "..", "shared"));
        var far = System.IO.Path.GetFullPath(System.IO.Path.Combine(repository, "..", "..", "shared"));
        return Directory.Exists(near) || !Directory.Exists(far) ? near : far;
    }

    private static string Here([CallerFilePath] string file = "") => file;
}

/// <summary>A folder of its own for a test, removed with everything in it.</summary>
internal sealed class TemporaryFolder : IDisposable
{
    public string Path { get; } = Directory.CreateTempSubdirectory("miniseq-").FullName;

    public string this[string name] => System.IO.Path.Combine(Path, name);

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
