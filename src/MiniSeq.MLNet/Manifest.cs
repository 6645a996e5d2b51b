using System.Text.Json;

namespace MiniSeq.MLNet;

/// <summary>What is inside the zip file: the settings, and which files must lie beside it.</summary>
/// <param name="Version">Of this format.</param>
/// <param name="Settings">Columns, template, lengths, generation.</param>
/// <param name="Folder">Absolute path of the Hugging Face folder when it was written.</param>
/// <param name="Files">Every file of the folder, by name.</param>
internal sealed record Manifest(int Version, PipelineSettings Settings, string Folder, IReadOnlyDictionary<string, FileSeal> Files)
{
    private const int CurrentVersion = 1;

    public string ToJson() => JsonSerializer.Serialize(this);

    /// <exception cref="InvalidDataException">The text is damaged, or of a newer library.</exception>
    public static Manifest Parse(ReadOnlyMemory<char> json)
    {
        try
        {
            var manifest = JsonSerializer.Deserialize<Manifest>(json.Span) ?? throw new JsonException("it is null");
            if (manifest.Version != CurrentVersion)
                throw new InvalidDataException($"The MiniSeq model has manifest version {manifest.Version}; this library reads version {CurrentVersion}. Update MiniSeq.MLNet.");
            if (manifest.Settings is null || manifest.Folder is null || manifest.Files is null || manifest.Files.Keys.Any(name => Path.GetFileName(name) != name))
                throw new JsonException("a part is missing, or a file is not in the folder itself");
            return manifest;
        }
        catch (JsonException e)
        {
            throw new InvalidDataException($"The manifest of the MiniSeq model is damaged: {e.Message}. Save the model again.", e);
        }
    }

    /// <summary>Writes the folder of a model and describes it.</summary>
    /// <param name="session">The model.</param>
    /// <param name="weightsFolder">Where; null names it by its content, beside the zip file where that is known, else in the current directory.</param>
    public static Manifest Write(GenerationSession session, string? weightsFolder)
    {
        string place = ModelPlace.Folder ?? Environment.CurrentDirectory;
        string? wanted = weightsFolder is null ? null : Path.GetFullPath(weightsFolder, place);
        var (folder, files) = WeightsFolder.Write(session.SavePretrained, Path.GetDirectoryName(wanted) ?? place, wanted);
        return new Manifest(CurrentVersion, session.Settings, folder, files);
    }
}
