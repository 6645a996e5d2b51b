using System.Security.Cryptography;
using System.Text;
using System.Text.Json.Serialization;
using MiniSeq.Models;

namespace MiniSeq.MLNet;

/// <summary>What a file must be.</summary>
/// <param name="Bytes">Length.</param>
/// <param name="Sha256">Lower-case hexadecimal.</param>
internal sealed record FileSeal(long Bytes, string Sha256)
{
    public static FileSeal Of(string path)
    {
        using var stream = File.OpenRead(path);
        return new FileSeal(stream.Length, Convert.ToHexStringLower(SHA256.HashData(stream)));
    }

    /// <summary>The length of a file, or of what a link leads to: Hugging Face's cache is made of links.</summary>
    public static long Length(string path)
    {
        using var stream = File.OpenRead(path);
        return stream.Length;
    }
}

/// <summary>A folder of a model and what its files must be.</summary>
/// <param name="Folder">Absolute path when it was written, or read.</param>
/// <param name="Files">By name.</param>
internal sealed record ModelFiles(string Folder, IReadOnlyDictionary<string, FileSeal> Files)
{
    /// <summary>Whether a manifest says all of it, and names no file elsewhere.</summary>
    [JsonIgnore]
    public bool IsWhole => Folder is not null && Files is not null && Files.Keys.All(name => Path.GetFileName(name) == name);

    /// <summary>The file that tells a folder of this kind.</summary>
    [JsonIgnore]
    public string ConfigName => Files.ContainsKey(LoraExtensions.ConfigName) ? LoraExtensions.ConfigName : "config.json";
}

/// <summary>The checkpoint below a model's adapter, which is sealed when the model is saved: that reads all of it.</summary>
internal sealed class AdaptedCheckpoint
{
    private readonly ModelFiles? _sealed;
    private readonly (string Path, long Bytes, DateTime Written)[] _files = [];

    /// <summary>One that was sealed before.</summary>
    public AdaptedCheckpoint(ModelFiles files) => (Folder, _sealed) = (files.Folder, files);

    /// <summary>The configuration and the weights in a folder, as they are now.</summary>
    public AdaptedCheckpoint(string folder)
    {
        Folder = Path.TrimEndingDirectorySeparator(Path.GetFullPath(folder));
        using var weights = SafetensorsReader.Open(Folder);
        _files = [.. weights.Paths.Prepend(Path.Combine(Folder, "config.json")).Select(State)];
    }

    public string Folder { get; }

    /// <summary>What the files must be.</summary>
    /// <exception cref="InvalidOperationException">They are no longer those the adapter was trained on.</exception>
    public ModelFiles Seal()
    {
        if (_sealed is not null) return _sealed;
        foreach (var file in _files)
            if (!File.Exists(file.Path) || State(file.Path) != file)
                throw new InvalidOperationException($"'{file.Path}' has changed since the model was loaded: the adapter does not belong to what is there now. Save the adapter alone (SaveAdapter) or the merged weights (SavePretrained).");
        return new ModelFiles(Folder, new SortedDictionary<string, FileSeal>(_files.ToDictionary(f => Path.GetFileName(f.Path), f => FileSeal.Of(f.Path)), StringComparer.Ordinal));
    }

    private static (string, long, DateTime) State(string path) => (path, FileSeal.Length(path), File.GetLastWriteTimeUtc(path));
}

/// <summary>The Hugging Face folder beside a saved pipeline: written, found again and checked. Files pass through in a stream.</summary>
internal static class WeightsFolder
{
    public const string PathVariable = "MINISEQ_MODEL_PATH";

    /// <summary>Writes a folder whole: first under a temporary name, then renamed, or its files moved into the folder that is there.</summary>
    /// <param name="write">Fills the folder it is given.</param>
    /// <param name="parent">Where a folder goes that is named by its content.</param>
    /// <param name="wanted">Another place; null names it by its content.</param>
    /// <exception cref="InvalidOperationException">An adapter is to be written over a checkpoint, or a checkpoint over an adapter.</exception>
    public static (string Folder, SortedDictionary<string, FileSeal> Files) Write(Action<string> write, string parent, string? wanted)
    {
        Directory.CreateDirectory(parent);
        string temporary = Path.Combine(parent, $".miniseq-{Guid.NewGuid():N}.tmp");
        try
        {
            write(temporary);
            var files = new SortedDictionary<string, FileSeal>(Directory.GetFiles(temporary).ToDictionary(f => Path.GetFileName(f), FileSeal.Of), StringComparer.Ordinal);
            string folder = wanted ?? Path.Combine(parent, $"miniseq-model-{Digest(files)[..12]}");
            CheckKind(folder, files);
            if (Directory.Exists(folder)) MoveFiles(temporary, folder, files);
            else Directory.Move(temporary, folder);
            return (folder, files);
        }
        finally
        {
            if (Directory.Exists(temporary)) Directory.Delete(temporary, recursive: true);
        }
    }

    /// <summary>The first place with the very files.</summary>
    /// <param name="model">What is looked for.</param>
    /// <param name="what">The same in words.</param>
    /// <param name="places">Folders the zip file may be in.</param>
    /// <exception cref="FileNotFoundException">The folder, or a file in it, is nowhere.</exception>
    /// <exception cref="InvalidDataException">A file is not what was saved.</exception>
    public static string Find(ModelFiles model, string what, IReadOnlyList<string> places)
    {
        List<string> candidates = [.. Candidates(model, places).Distinct()];
        Exception? first = null;
        foreach (string folder in candidates.Where(Directory.Exists))
        {
            if (Problem(folder, model) is not { } problem) return folder;
            first ??= problem;
        }
        string name = Path.GetFileName(model.Folder);
        throw first ?? new FileNotFoundException($"{what} of this MiniSeq model is a folder '{name}', and that is in none of these places: {string.Join(", ", candidates)}. "
            + $"Copy the folder there, or say where it is in the environment variable {PathVariable} or in MiniSeqCatalog.ModelSearchPaths.", model.Folder);
    }

    private static IEnumerable<string> Candidates(ModelFiles model, IReadOnlyList<string> places)
    {
        string name = Path.GetFileName(model.Folder);
        string? variable = Environment.GetEnvironmentVariable(PathVariable);
        foreach (string path in MiniSeqCatalog.ModelSearchPaths.Concat(string.IsNullOrEmpty(variable) ? [] : [variable]))
        {
            yield return Path.Combine(Path.GetFullPath(path), name);
            // The folder itself, under whatever name; a folder that only holds models is none.
            if (File.Exists(Path.Combine(path, model.ConfigName))) yield return Path.GetFullPath(path);
        }
        foreach (string place in places) yield return Path.Combine(place, name);
        yield return model.Folder;
        yield return Path.Combine(Environment.CurrentDirectory, name);
        yield return Path.Combine(Path.TrimEndingDirectorySeparator(AppContext.BaseDirectory), name);
    }

    private static Exception? Problem(string folder, ModelFiles model)
    {
        // All lengths first: a missing or truncated file is then known without reading gigabytes.
        foreach (var (name, seal) in model.Files)
        {
            string path = Path.Combine(folder, name);
            if (!File.Exists(path)) return new FileNotFoundException($"'{path}' is missing: it belongs to this MiniSeq model. Copy the whole folder as it was saved, or save the model again.", path);
            if (FileSeal.Length(path) is var bytes && bytes != seal.Bytes) return Changed(path, $"it has {bytes} bytes and had {seal.Bytes}");
        }
        foreach (var (name, seal) in model.Files)
        {
            string path = Path.Combine(folder, name), sha = FileSeal.Of(path).Sha256;
            if (sha != seal.Sha256) return Changed(path, $"its SHA-256 is {sha} and was {seal.Sha256}");
        }
        return null;
    }

    private static InvalidDataException Changed(string path, string how) =>
        new($"'{path}' is damaged or not the file this MiniSeq model was saved with: {how}. Copy the folder as it was saved, or save the model again.");

    private static void MoveFiles(string from, string to, IReadOnlyDictionary<string, FileSeal> files)
    {
        foreach (string name in files.Keys) File.Move(Path.Combine(from, name), Path.Combine(to, name), overwrite: true);
        // Weights of an earlier save in other shards would be read with, or instead of, the new ones.
        foreach (string path in Directory.GetFiles(to))
            if (SafetensorsWriter.IsWeightFile(Path.GetFileName(path)) && !files.ContainsKey(Path.GetFileName(path))) File.Delete(path);
    }

    // A checkpoint is not overwritten by an adapter, perhaps its own; and weights beside an adapter would be taken for the ones below it.
    private static void CheckKind(string folder, IReadOnlyDictionary<string, FileSeal> files)
    {
        bool adapter = files.ContainsKey(LoraExtensions.ConfigName);
        string other = adapter ? "config.json" : LoraExtensions.ConfigName;
        if (File.Exists(Path.Combine(folder, other)))
            throw new InvalidOperationException($"'{folder}' holds {(adapter ? "a checkpoint" : "an adapter")}, and {(adapter ? "an adapter" : "a checkpoint")} is to be saved there: choose another folder.");
    }

    // As of the lines that sha256sum prints.
    private static string Digest(IEnumerable<KeyValuePair<string, FileSeal>> files) =>
        Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes(string.Concat(files.Select(f => $"{f.Value.Sha256}  {f.Key}\n")))));
}
