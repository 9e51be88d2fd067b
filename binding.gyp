# node-gyp only forwards to the CMake build: `npx node-gyp rebuild` gives build/Release/lockstep.node.
{
  "targets": [
    {
      "target_name": "lockstep_cmake",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake",
          "message": "building the addon with CMake",
          "inputs": ["native/CMakeLists.txt", "scripts/build-native.mjs"],
          "outputs": ["<(PRODUCT_DIR)/lockstep.node"],
          "action": ["node", "scripts/build-native.mjs"]
        }
      ]
    }
  ]
}
