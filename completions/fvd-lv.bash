# bash completion for fvd-lv. Written by scripts/make-completions.
_fvd_lv() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command= word
    COMPREPLY=()
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case $word in provision|serve|extend|info|attach-info|attach|detach|events|prefetch|copy-on-read|profile|map|check|acknowledge|dump|list|remove|torture) command=$word; break ;; esac
    done
    # Bash splits file:PATH at the colon.
    if [[ $current == : ]]; then current=; previous=:; fi
    if [[ $previous == : ]]; then _fvd_lv_files -f; return; fi
    case $command:$previous in
        provision:--output|serve:--output|extend:--output|info:--output|attach-info:--output|attach:--output|detach:--output|events:--output|prefetch:--output|copy-on-read:--output|profile:--output|map:--output|check:--output|acknowledge:--output|dump:--output|list:--output|remove:--output|torture:--output) COMPREPLY=($(compgen -W "text json" -- "$current")); return ;;
        provision:--size) :; return ;;
        provision:--base) _fvd_lv_files -f; return ;;
        provision:--base-format) COMPREPLY=($(compgen -W "raw nbd qcow2 qed vmdk vdi vhdx vpc parallels" -- "$current")); return ;;
        provision:--base-allow|serve:--base-allow|check:--base-allow) _fvd_lv_files -f; return ;;
        provision:--copy-on-read|serve:--copy-on-read) COMPREPLY=($(compgen -W "on off" -- "$current")); return ;;
        provision:--prefetch|serve:--prefetch) COMPREPLY=($(compgen -W "on off" -- "$current")); return ;;
        provision:--layout) COMPREPLY=($(compgen -W "compact raw" -- "$current")); return ;;
        provision:--block-size) :; return ;;
        provision:--chunk-size) :; return ;;
        provision:--journal-size) :; return ;;
        provision:--grow-step) :; return ;;
        provision:--placement) COMPREPLY=($(compgen -W "append spread" -- "$current")); return ;;
        provision:--max-overcommit) :; return ;;
        serve:--socket) _fvd_lv_files -f; return ;;
        serve:--listen) :; return ;;
        serve:--vhost-user) _fvd_lv_files -f; return ;;
        serve:--queues) :; return ;;
        serve:--cache) COMPREPLY=($(compgen -W "none writeback writethrough directsync unsafe" -- "$current")); return ;;
        serve:--on-full) COMPREPLY=($(compgen -W "wait error" -- "$current")); return ;;
        serve:--prefetch-delay) :; return ;;
        serve:--prefetch-rate) :; return ;;
        serve:--profile|prefetch:--profile) _fvd_lv_files -f; return ;;
        serve:--base-timeout) :; return ;;
        serve:--socket-mode) :; return ;;
        serve:--socket-group) COMPREPLY=($(compgen -g -- "$current")); return ;;
        extend:--by) :; return ;;
        attach-info:--format) COMPREPLY=($(compgen -W "all qemu qmp libvirt uri" -- "$current")); return ;;
        attach-info:--target) :; return ;;
        attach-info:--over) COMPREPLY=($(compgen -W "vhost-user nbd" -- "$current")); return ;;
        attach-info:--memory) :; return ;;
        attach:--name) :; return ;;
        events:--count) :; return ;;
        prefetch:--rate) :; return ;;
        prefetch:--delay) :; return ;;
        profile:--file) _fvd_lv_files -f; return ;;
        profile:--seconds|torture:--seconds) :; return ;;
        map:--offset) :; return ;;
        map:--length) :; return ;;
        map:--picture) COMPREPLY=($(compgen -W "auto always never" -- "$current")); return ;;
        torture:--seed) :; return ;;
        torture:--worlds) :; return ;;
        torture:--requests) :; return ;;
        torture:--jobs) :; return ;;
        torture:--only) :; return ;;
        torture:--events) :; return ;;
        torture:--nbd) :; return ;;
        torture:--qemu) :; return ;;
        torture:--disk) :; return ;;
        torture:--script) :; return ;;
    esac
    case $command in
        "") COMPREPLY=($(compgen -W "provision serve extend info attach-info attach detach events prefetch copy-on-read profile map check acknowledge dump list remove torture --help --version --output --verbose" -- "$current")) ;;
        provision) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --size --base --truncate-base --base-format --base-allow --copy-on-read --prefetch --layout --block-size --chunk-size --journal-size --grow-step --placement --max-overcommit --force" -- "$current")); else _fvd_lv_volumes; fi ;;
        serve) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --socket --listen --vhost-user --queues --cache --read-only --on-full --zero-chunks --copy-on-read --prefetch --prefetch-delay --prefetch-rate --profile --base-timeout --base-allow --discard-pending --socket-mode --socket-group" -- "$current")); else _fvd_lv_volumes; fi ;;
        extend) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --by" -- "$current")); else _fvd_lv_volumes; fi ;;
        info) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose" -- "$current")); else _fvd_lv_volumes; fi ;;
        attach-info) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --format --iothread --target --over --memory" -- "$current")); else _fvd_lv_volumes; fi ;;
        attach) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --name" -- "$current")); else _fvd_lv_volumes; fi ;;
        detach) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --force" -- "$current")); else _fvd_lv_volumes; fi ;;
        events) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --history --count" -- "$current")); else _fvd_lv_volumes; fi ;;
        prefetch) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --rate --delay --profile --follow --wait" -- "$current")); else case " ${COMP_WORDS[*]:0:COMP_CWORD} " in *" start "*|*" stop "*|*" status "*) _fvd_lv_volumes ;; *) COMPREPLY=($(compgen -W "start stop status" -- "$current")) ;; esac; fi ;;
        copy-on-read) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose" -- "$current")); else case " ${COMP_WORDS[*]:0:COMP_CWORD} " in *" on "*|*" off "*) _fvd_lv_volumes ;; *) COMPREPLY=($(compgen -W "on off" -- "$current")) ;; esac; fi ;;
        profile) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --file --seconds" -- "$current")); else case " ${COMP_WORDS[*]:0:COMP_CWORD} " in *" record "*|*" show "*) _fvd_lv_recorded ;; *) COMPREPLY=($(compgen -W "record show" -- "$current")) ;; esac; fi ;;
        map) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --offset --length --picture" -- "$current")); else _fvd_lv_volumes; fi ;;
        check) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --base-allow" -- "$current")); else _fvd_lv_volumes; fi ;;
        acknowledge) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose" -- "$current")); else _fvd_lv_volumes; fi ;;
        dump) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose" -- "$current")); else _fvd_lv_volumes; fi ;;
        list) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --served" -- "$current")); else _fvd_lv_places; fi ;;
        remove) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --wipe" -- "$current")); else _fvd_lv_volumes; fi ;;
        torture) if [[ $current == -* ]]; then COMPREPLY=($(compgen -W "--help --output --verbose --seed --worlds --requests --seconds --jobs --keep-going --bytes --combinations --trace --only --events --shrink --nbd --qemu --gentle --base --console --disk --script" -- "$current")); else :; fi ;;
    esac
}
_fvd_lv_files() {
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$current")
}
_fvd_lv_volumes() {
    if [[ $current == /* ]]; then _fvd_lv_files -f; return; fi
    COMPREPLY=($(compgen -W "file: /dev/ $(_fvd_lv_lvm lvs -o lv_full_name @fvd.disk)" \
        -- "$current"))
    [[ ${COMPREPLY[0]-} == */?* ]] || compopt -o nospace 2>/dev/null
}
_fvd_lv_recorded() {
    case " ${COMP_WORDS[*]:0:COMP_CWORD} " in *" show "*) _fvd_lv_files -f ;; *) _fvd_lv_volumes ;; esac
}
_fvd_lv_places() {
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen -d -- "$current"; compgen -W "$(_fvd_lv_lvm vgs -o vg_name)" -- "$current")
}
# Only root may ask lvm; whatever it complains of is not for a completion.
_fvd_lv_lvm() { ((EUID == 0)) && "$@" --noheadings 2>/dev/null; }
complete -F _fvd_lv fvd-lv
