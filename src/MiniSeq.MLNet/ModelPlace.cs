
namespace MiniSeq.MLNet;

/// <summary>Where the zip file is that is being saved or loaded: ML.NET tells neither the transformer nor the mapping's factory.</summary>
internal static class ModelPlace
{
    private static readonly AsyncLocal<string?> s_folder = new();

    /// <summary>The folder that <c>mlContext.MiniSeq().Save</c> or <c>Load</c> works in; null outside of them.</summary>
    public static string? Folder => s_folder.Value;

    public static IDisposable Enter(string filePath)
    {
        ArgumentException.ThrowIfNullOrEmpty(filePath);
        string? before = s_folder.Value;
        s_folder.Value = Path.GetDirectoryName(Path.GetFullPath(filePath));
        return new Scope(before);
    }

    /// <summary>
    /// Folders the zip file may be in, while ML.NET reads it. On Linux plain <c>Model.Load</c> is served too: the file is open now, and so
    /// among those of the process. A wrong guess does no harm, for the weights found there must have the SHA-256 of the manifest.
    /// </summary>
    public static IReadOnlyList<string> WhileLoading() => Folder is { } known ? [known] : OperatingSystem.IsLinux() ? FoldersOfOpenFiles() : [];

    private static List<string> FoldersOfOpenFiles()
    {
        try
        {
            return [.. Directory.EnumerateFileSystemEntries("/proc/self/fd")
                .Select(fd => new FileInfo(fd).LinkTarget)
                .Where(target => target is not null && target.StartsWith('/') && File.Exists(target))
                .Select(target => Path.GetDirectoryName(target)!)
                .Distinct()];
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return []; // no /proc, or a file closed meanwhile: the other places are left
        }
    }

    private sealed class Scope(string? before) : IDisposable
    {
        public void Dispose() => s_folder.Value = before;
    }
}
