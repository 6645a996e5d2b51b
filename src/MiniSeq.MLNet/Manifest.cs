using System.Text.Json;
using System.Text.Json.Serialization;

namespace MiniSeq.MLNet;

/// <summary>What is inside the zip file: the settings, and which files must lie beside it.</summary>
/// <param name="Version">Of this format.</param>
/// <param name="Settings">Columns, template, lengths, generation.</param>
/// <param name="Folder">Absolute path of the Hugging Face folder, or of the adapter's, when it was written.</param>
/// <param name="Files">Every file of the folder, by name.</param>
/// <param name="Adapted">The checkpoint that the adapter is for; null where the folder has the weights themselves.</param>
internal sealed record Manifest(int Version, PipelineSettings Settings, string Folder, IReadOnlyDictionary<string, FileSeal> Files, ModelFiles? Adapted = null)
{
    private const int FirstVersion = 1; // what the first version of the library reads: without adapter and chat template
    private const int CurrentVersion = 2;

    /// <summary>The folder beside the zip file.</summary>
    [JsonIgnore]
    public ModelFiles Weights => new(Folder, Files);

    public string ToJson() => JsonSerializer.Serialize(this);

    /// <exception cref="InvalidDataException">The text is damaged, or of a newer library.</exception>
    public static Manifest Parse(ReadOnlyMemory<char> json)
    {
        try
        {
            var manifest = JsonSerializer.Deserialize<Manifest>(json.Span) ?? throw new JsonException("it is null");
            if (manifest.Version is not (FirstVersion or CurrentVersion))
                throw new InvalidDataException($"The MiniSeq model has manifest version {manifest.Version}; this library reads versions {FirstVersion} to {CurrentVersion}. Update MiniSeq.MLNet.");
            if (manifest.Settings is null || !manifest.Weights.IsWhole || manifest.Adapted is { IsWhole: false })
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
        var adapted = session.Adapted?.Seal();
        var (folder, files) = WeightsFolder.Write(session.Adapted is null ? session.SavePretrained : session.SaveAdapter, Path.GetDirectoryName(wanted) ?? place, wanted);
        int version = adapted is null && session.Settings.ChatTemplate is null ? FirstVersion : CurrentVersion;
        return new Manifest(version, session.Settings, folder, files, adapted);
    }
}
