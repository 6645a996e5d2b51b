namespace MiniSeq.Models;

/// <summary>Files under temporary names, which get their own names when all are written: each is whole or not there.</summary>
internal sealed class PendingFiles : IDisposable
{
    private readonly List<(string Temporary, string Path, FileStream Stream)> _files = [];

    public Stream Add(string path)
    {
        var temporary = $"{path}.{Guid.NewGuid():N}.tmp";
        var stream = new FileStream(temporary, FileMode.CreateNew, FileAccess.Write, FileShare.None);
        _files.Add((temporary, path, stream));
        return stream;
    }

    public void Commit()
    {
        foreach (var (_, _, stream) in _files)
        {
            // On the disk before the rename: a rename may survive a power cut that its data does not.
            stream.Flush(flushToDisk: true);
            stream.Dispose();
        }
        foreach (var (temporary, path, _) in _files)
            File.Move(temporary, path, overwrite: true);
    }

    public void Dispose()
    {
        foreach (var (temporary, _, stream) in _files)
        {
            stream.Dispose();
            File.Delete(temporary); // no fault if it was renamed
        }
    }
}
